/* Agreement: on the status of a phase, with the message of the rank that failed, and on the word of a step.
 * Refuses to talk over an MPI that has failed: then the status stays local and the end of the world ends all. */
#include "comm/internal.h"
#include <stdio.h>
#include <string.h>

/* The last message that this thread agreed on. A status that passes through two agreements keeps one "rank N: ". */
static _Thread_local char agreed[CPL_MESSAGE_MAX];

static void compose(const cpl_comm *c, cpl_status st, char text[CPL_MESSAGE_MAX]) {
    const char *message = cpl_status_message();
    if (message[0] == '\0') {
        message = cpl_status_text(st);
    }
    if (agreed[0] != '\0' && strstr(message, agreed) != NULL) {
        snprintf(text, CPL_MESSAGE_MAX, "%s", message);
        return;
    }
    int head = snprintf(text, CPL_MESSAGE_MAX, "rank %d: ", c->world_rank);
    snprintf(text + head, (size_t)(CPL_MESSAGE_MAX - head), "%s", message);
}

cpl_status cpl_agree(cpl_comm *c, cpl_status own) {
    cpl_status st = CPL_OK;
    if (c->size == 1 || cpl_comm_mpi_broken()) {
        return own;
    }
    /* The largest (status, -rank): the worst status and of equal ones the lowest rank. */
    int64_t key = ((int64_t)own << 32) | (int64_t)(INT32_MAX - c->rank);
    CPL_TRY(c->ops->allreduce_i64(c, &key, 1, CPL_MAX));
    cpl_status worst = (cpl_status)(key >> 32);
    if (worst == CPL_OK) {
        goto done;
    }
    int root = (int)(INT32_MAX - (key & UINT32_MAX));
    char text[CPL_MESSAGE_MAX] = {0};
    if (c->rank == root) {
        compose(c, worst, text);
    }
    CPL_TRY(c->ops->bcast(c, text, sizeof text, root));
    text[CPL_MESSAGE_MAX - 1] = '\0';
    cpl_status_set_message(text);
    memcpy(agreed, text, sizeof agreed);
    st = worst;
done:
    return st;
}

cpl_status cpl_comm_agree_word(cpl_comm *c, uint32_t *word) {
    return c->ops->or_u32(c, word);
}
