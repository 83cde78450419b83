/* Times of operations, one by one: two marks around each, read when all are over.
 * Refuses to wait between operations: the device is as busy as without it. */
#include "io/base/log.h"
#include "kernels/backend.h"
#include <string.h>

/* The marks of operation i; those below CPL_MARKS are other people's. */
static int mark_of(int64_t i, int end) {
    return CPL_MARKS + 2 * (int)i + end;
}

static bool has_clock(const cpl_device *dev) {
    return ((const cpl_backend_device *)dev->impl)->backend->mark != NULL;
}

static cpl_status reserve(cpl_trace *t) {
    cpl_status st = CPL_OK;
    cpl_traced_op *grown = NULL;
    if (t->count < t->room) {
        return CPL_OK;
    }
    int64_t room = t->room == 0 ? 1024 : 2 * t->room;
    CPL_TRY(cpl_alloc(&grown, (size_t)room, sizeof *grown, "profile"));
    if (t->count > 0) {
        memcpy(grown, t->op, (size_t)t->count * sizeof *grown);
    }
    cpl_free(&t->op);
    t->op = grown;
    t->room = room;
done:
    return st;
}

void cpl_trace_begin(cpl_device *dev, const char *op) {
    cpl_trace *t = dev->trace;
    if (t->depth++ > 0 || t->status != CPL_OK) {
        return;
    }
    t->status = reserve(t);
    if (t->status == CPL_OK) {
        t->op[t->count++] = (cpl_traced_op){.op = op, .at = 1e3 * cpl_now()};
        t->status = cpl_device_mark(dev, mark_of(t->count - 1, 0));
    }
}

cpl_status cpl_trace_end(cpl_device *dev, cpl_status st) {
    cpl_trace *t = dev->trace;
    if (--t->depth > 0 || t->status != CPL_OK) {
        return st;
    }
    t->op[t->count - 1].ms = 1e3 * cpl_now() - t->op[t->count - 1].at;
    t->status = cpl_device_mark(dev, mark_of(t->count - 1, 1));
    return st;
}

cpl_status cpl_trace_read(cpl_device *dev, cpl_trace *t) {
    cpl_status st = CPL_OK;
    CPL_TRY(dev->ops->synchronize(dev));
    CPL_TRY(t->status);
    for (int64_t i = t->count; i-- > 0;) {
        t->op[i].at -= t->op[0].at;
        if (has_clock(dev)) {
            CPL_TRY(cpl_device_mark_ms(dev, mark_of(0, 0), mark_of(i, 0), &t->op[i].at));
            CPL_TRY(cpl_device_mark_ms(dev, mark_of(i, 0), mark_of(i, 1), &t->op[i].ms));
        }
    }
done:
    return st;
}

void cpl_trace_free(cpl_trace *t) {
    cpl_free(&t->op);
    *t = (cpl_trace){0};
}
