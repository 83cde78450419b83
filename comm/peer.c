/* Sums of a pair of ranks through mailboxes in device memory: each writes into the other's by copy engines and raises a word there;
 * GPUs wait for words, the host for nothing. Refuses to take what has not come: every word is lowered by who waited for it, and a
 * mailbox is written again only after it was emptied. */
#include "comm/peer.h"
#include "io/base/log.h"
#include "kernels/cuda/driver.h"
#include <cuda.h>
#include <stdio.h>

/* Words are 0 or 1, raised by the other rank: that this mailbox is full, and that its own is empty. */
typedef struct {
    uint32_t full, empty;
} words;
/* A mailbox: words, then the other rank's share of this rank's part of a sum. */
typedef struct {
    char *base; /* device memory */
} mailbox;

struct cpl_peer {
    cpl_comm *comm;      /* borrowed */
    cpl_device *dev;     /* borrowed */
    cudaStream_t beside; /* borrowed */
    cudaEvent_t came;    /* owned */
    CUresult (*mem_op)(CUstream, unsigned, CUstreamBatchMemOpParams *, unsigned);
    mailbox own;      /* owned */
    mailbox other;    /* owned mapping of the other rank's */
    int64_t elements; /* of a sum, in each mailbox */
    bool giving;      /* a sum has begun */
    bool shared;      /* both ranks have come to where mailboxes are made */
};

static words *words_of(mailbox m) {
    return (words *)m.base;
}
static float *sums_of(mailbox m) {
    return (float *)(m.base + CPL_PEER_WORDS);
}

static cpl_status cuda_status(cudaError_t error, const char *file, int line, const char *doing) {
    if (error == cudaSuccess) {
        return CPL_OK;
    }
    (void)cudaGetLastError();
    return cpl_fail(CPL_DEVICE, file, line, "cannot %s: CUDA: %s (%s)", doing, cudaGetErrorString(error), cudaGetErrorName(error));
}
#define CUDA_TRY(doing, call) CPL_TRY(cuda_status((call), __FILE__, __LINE__, (doing)))

/* --- words --- */

static cpl_status enqueue(const cpl_peer *p, cudaStream_t stream, CUstreamBatchMemOpParams *ops, unsigned count) {
    CUresult result = p->mem_op((CUstream)stream, count, ops, 0);
    return result == CUDA_SUCCESS
               ? CPL_OK
               : cpl_fail(CPL_DEVICE, __FILE__, __LINE__, "cannot enqueue a word between GPUs: CUDA error %d", (int)result);
}

static CUstreamBatchMemOpParams write_word(uint32_t *word, uint32_t value) {
    CUstreamBatchMemOpParams op = {.operation = CU_STREAM_MEM_OP_WRITE_VALUE_32};
    op.writeValue.address = (CUdeviceptr)(uintptr_t)word;
    op.writeValue.value = value;
    op.writeValue.flags = CU_STREAM_WRITE_VALUE_DEFAULT; /* after what the stream wrote before */
    return op;
}

/* A word of the other rank, after all that the stream holds. */
static cpl_status raise_word(const cpl_peer *p, cudaStream_t stream, uint32_t *word) {
    CUstreamBatchMemOpParams op = write_word(word, 1);
    return enqueue(p, stream, &op, 1);
}
/* A word of this rank, before all that follows. */
static cpl_status await_word(const cpl_peer *p, cudaStream_t stream, uint32_t *word) {
    CUstreamBatchMemOpParams ops[2] = {{.operation = CU_STREAM_MEM_OP_WAIT_VALUE_32}, write_word(word, 0)};
    ops[0].waitValue.address = (CUdeviceptr)(uintptr_t)word;
    ops[0].waitValue.value = 1;
    ops[0].waitValue.flags = CU_STREAM_WAIT_VALUE_EQ;
    return enqueue(p, stream, ops, 2);
}

/* --- mailboxes --- */

static cpl_status copy(const cpl_peer *p, void *to, const void *from, size_t bytes) {
    return bytes == 0 ? CPL_OK
                      : cuda_status(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, p->beside), __FILE__, __LINE__,
                                    "copy to the other GPU");
}

/* Nobody writes any more; the other rank lets go of this mailbox before it is freed. Collective, whatever each of them has. */
static cpl_status let_go(cpl_peer *p) {
    cpl_status st = CPL_OK;
    cpl_status quiet = cuda_status(cudaStreamSynchronize(p->beside), __FILE__, __LINE__, "wait for copies");
    CPL_TRY(cpl_agree(p->comm, quiet == CPL_OK ? p->dev->ops->synchronize(p->dev) : quiet));
    if (p->other.base != NULL) {
        (void)cudaIpcCloseMemHandle(p->other.base); /* the address is not used again */
        p->other.base = NULL;
    }
    CPL_TRY(cpl_comm_barrier(p->comm));
    cpl_device_free(p->dev, &p->own.base);
    p->elements = 0;
done:
    return st;
}

/* What a rank tells the other of its mailbox. */
typedef struct {
    cudaIpcMemHandle_t handle;
} address;

/* Own mailbox for `elements`, its words lowered, and the handle that the other rank maps it by. */
static cpl_status make(cpl_peer *p, int64_t elements, address *to) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_device_alloc(p->dev, &p->own.base, (size_t)cpl_peer_bytes(elements), 1, "memory that the other GPU writes to"));
    CUDA_TRY("clear a mailbox", cudaMemset(p->own.base, 0, sizeof(words)));
    CUDA_TRY("clear a mailbox", cudaDeviceSynchronize());
    CUDA_TRY("share memory with the other GPU", cudaIpcGetMemHandle(&to->handle, p->own.base));
    p->elements = elements;
done:
    return st;
}

/* Maps the other's and says there that this rank's own is empty. */
static cpl_status map(cpl_peer *p, const address *from) {
    cpl_status st = CPL_OK;
    void *mapped = NULL;
    const words empty = {.empty = 1};
    CUDA_TRY("map the other GPU's memory", cudaIpcOpenMemHandle(&mapped, from->handle, cudaIpcMemLazyEnablePeerAccess));
    p->other.base = mapped;
    CUDA_TRY("write to the other GPU", cudaMemcpy(p->other.base, &empty, sizeof empty, cudaMemcpyHostToDevice));
    CUDA_TRY("write to the other GPU", cudaDeviceSynchronize());
done:
    return st;
}

/* What the other wrote has come here. */
static cpl_status check(cpl_peer *p) {
    cpl_status st = CPL_OK;
    words w;
    CUDA_TRY("read a mailbox", cudaMemcpy(&w, p->own.base, sizeof w, cudaMemcpyDeviceToHost));
    if (w.empty != 1 || w.full != 0) {
        CPL_FAIL(CPL_DEVICE, "what the other GPU wrote did not arrive");
    }
done:
    return st;
}

/* Collective. Mailboxes for sums of `elements`, in place of smaller ones. */
static cpl_status reserve(cpl_peer *p, int64_t elements) {
    cpl_status st = CPL_OK;
    cpl_comm *c = p->comm;
    address at[2];
    memset(at, 0, sizeof at);
    p->shared = true;
    CPL_TRY(let_go(p));
    CPL_TRY(cpl_agree(c, make(p, elements, &at[c->rank])));
    for (int r = 0; r <= 2; r++) {
        c->offset[r] = r * (int64_t)sizeof at[0];
    }
    CPL_TRY(c->ops->allgather(c, at, c->offset));
    CPL_TRY(cpl_agree(c, map(p, &at[1 - c->rank])));
    CPL_TRY(cpl_agree(c, check(p)));
done:
    return st;
}

/* --- sums --- */

cpl_status cpl_peer_give(cpl_peer *p, const float *x, const int64_t *begin, int64_t first, int64_t count) {
    cpl_status st = CPL_OK;
    int other = 1 - p->comm->rank;
    int64_t longest = begin[1] - begin[0] > begin[2] - begin[1] ? begin[1] - begin[0] : begin[2] - begin[1];
    if (!p->giving) {
        if (longest > p->elements) {
            CPL_TRY(reserve(p, longest));
        }
        CPL_TRY(await_word(p, p->beside, &words_of(p->own)->empty));
        p->giving = true;
    }
    CPL_TRY(copy(p, sums_of(p->other) + (first - begin[other]), x + first, (size_t)count * sizeof *x));
done:
    return st;
}

cpl_status cpl_peer_add(cpl_peer *p, float *x, const int64_t *begin) {
    cpl_status st = CPL_OK;
    int rank = p->comm->rank;
    cudaStream_t stream = cpl_device_stream(p->dev);
    CPL_TRY(raise_word(p, p->beside, &words_of(p->other)->full));
    CPL_TRY(await_word(p, p->beside, &words_of(p->own)->full));
    CUDA_TRY("order the device after copies", cudaEventRecord(p->came, p->beside));
    CUDA_TRY("order the device after copies", cudaStreamWaitEvent(stream, p->came, 0));
    CPL_TRY(CPL_OPS(p->dev, add_f32, x + begin[rank], sums_of(p->own), begin[rank + 1] - begin[rank]));
    CPL_TRY(raise_word(p, stream, &words_of(p->other)->empty));
    p->giving = false;
done:
    return st;
}

/* --- beginning and end --- */

static cpl_status prepare(cpl_peer **out, cpl_comm *c, cpl_device *dev, cudaStream_t beside) {
    cpl_status st = CPL_OK;
    cpl_peer *p = NULL;
    CPL_TRY(cpl_alloc(&p, 1, sizeof *p, "the other rank"));
    *out = p;
    *p = (cpl_peer){.comm = c, .dev = dev, .beside = beside};
    *(void **)&p->mem_op = cpl_cuda_driver_call("cuStreamBatchMemOp");
    if (p->mem_op == NULL) {
        CPL_FAIL(CPL_UNSUPPORTED, "the driver has no cuStreamBatchMemOp");
    }
    CUDA_TRY("make an event", cudaEventCreateWithFlags(&p->came, cudaEventDisableTiming));
done:
    return st;
}

cpl_status cpl_peer_open(cpl_peer **out, cpl_comm *c, cpl_device *dev, cudaStream_t beside, char *why, size_t size) {
    cpl_peer *p = NULL;
    cpl_status st = cpl_agree(c, prepare(&p, c, dev, beside));
    st = st == CPL_OK ? reserve(p, CPL_PEER_LEAST) : st;
    if (st == CPL_OK) {
        *out = p;
        return CPL_OK;
    }
    snprintf(why, size, "%s", cpl_status_message());
    cpl_peer_close(&p);
    *out = NULL;
    return st == CPL_DEVICE || st == CPL_UNSUPPORTED ? CPL_OK : st;
}

void cpl_peer_close(cpl_peer **peer) {
    cpl_peer *p = *peer;
    if (p == NULL) {
        return;
    }
    if (p->shared && !cpl_comm_mpi_broken() && let_go(p) != CPL_OK) {
        cpl_log_warn("%s", cpl_status_message());
    }
    if (p->came != NULL) {
        cudaEventDestroy(p->came);
    }
    cpl_free(peer);
}
