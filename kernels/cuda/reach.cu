/* Memory that several processes' GPUs share, how their devices wait for each other without a host, and copies beside all else.
 * Refuses GPUs that cannot change each other's memory atomically: then sums of what is not finite would be lost. */
#include "kernels/cuda/device.cuh"

namespace {

__device__ __forceinline__ void say(uint32_t *place, uint32_t word) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(place), "r"(word) : "memory");
}
__device__ __forceinline__ uint32_t hear(const uint32_t *place) {
    uint32_t word;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(word) : "l"(place) : "memory");
    return word;
}

/* One warp, a lane a rank: each tells all others the number of this meeting and its own bit, on their boards. A rank can be one
 * meeting ahead of another, not two: hence two sets of places, in turns. The board's last word counts meetings. */
__global__ void __launch_bounds__(32) meet_kernel(const cpl_reach board, uint32_t *word) {
    uint32_t *own = (uint32_t *)board.at[board.own];
    uint32_t number = own[CPL_BOARD_WORDS - 1] + 1, bit = word != nullptr && *word != 0, said = 0;
    uint32_t set = number % 2 * CPL_REACH_MOST;
    __syncwarp();
    if ((int)threadIdx.x < board.count) {
        __threadfence_system();
        say((uint32_t *)board.at[threadIdx.x] + set + board.own, number << 1 | bit);
        do {
            said = hear(own + set + threadIdx.x);
        } while (said >> 1 != (number & 0x7fffffffu));
    }
    bool any = __any_sync(0xffffffffu, said & 1);
    if (threadIdx.x == 0) {
        own[CPL_BOARD_WORDS - 1] = number;
        if (word != nullptr && any) {
            *word = 1;
        }
    }
}

} // namespace

extern "C" cpl_status cpl_cuda_meet(cpl_device *dev, const cpl_reach *board, uint32_t *word) {
    meet_kernel<<<1, 32, 0, cpl_cuda_stream(dev)>>>(*board, word);
    return cpl_cuda_launched(dev, "meeting of devices");
}

extern "C" bool cpl_cuda_reaches(const cpl_device *dev, const char *identity) {
    int other = -1, access = 0, atomics = 0, own = cpl_cuda_of(dev)->ordinal;
    bool reaches = cudaDeviceGetByPCIBusId(&other, identity) == cudaSuccess && other != own &&
                   cudaDeviceGetP2PAttribute(&access, cudaDevP2PAttrAccessSupported, own, other) == cudaSuccess &&
                   cudaDeviceGetP2PAttribute(&atomics, cudaDevP2PAttrNativeAtomicSupported, own, other) == cudaSuccess;
    (void)cudaGetLastError();
    return reaches && access != 0 && atomics != 0;
}

extern "C" cpl_status cpl_cuda_share(cpl_device *dev, const void *memory, cpl_shared_name *out) {
    cpl_status st = CPL_OK;
    cudaIpcMemHandle_t handle;
    static_assert(sizeof handle == sizeof *out, "a name is a handle of CUDA");
    CPL_CUDA_TRY("share memory with other GPUs", cudaIpcGetMemHandle(&handle, (void *)memory));
    memcpy(out, &handle, sizeof handle);
done:
    (void)cudaGetLastError(); /* who asks may do without, and the next launch must not find it */
    return st;
}

extern "C" cpl_status cpl_cuda_map(cpl_device *dev, const cpl_shared_name *name, void **out) {
    cpl_status st = CPL_OK;
    cudaIpcMemHandle_t handle;
    memcpy(&handle, name, sizeof handle);
    CPL_CUDA_TRY("map another GPU's memory", cudaIpcOpenMemHandle(out, handle, cudaIpcMemLazyEnablePeerAccess));
done:
    (void)cudaGetLastError();
    return st;
}

extern "C" void cpl_cuda_unmap(cpl_device *dev, void *memory) {
    cudaStreamSynchronize(cpl_cuda_stream(dev));
    (void)cudaIpcCloseMemHandle(memory); /* the address is not used again */
    (void)cudaGetLastError();
}

/* Made at the first copy: no graph is recorded then that needs it. */
static cpl_status make_beside(cpl_cuda *cuda) {
    cpl_status st = CPL_OK;
    if (cuda->beside == NULL) {
        CPL_CUDA_TRY("make an event", cudaEventCreateWithFlags(&cuda->fork, cudaEventDisableTiming));
        CPL_CUDA_TRY("make an event", cudaEventCreateWithFlags(&cuda->joined, cudaEventDisableTiming));
        CPL_CUDA_TRY("make a stream", cudaStreamCreateWithFlags(&cuda->beside, cudaStreamNonBlocking));
    }
done:
    return st;
}

extern "C" cpl_status cpl_cuda_copy_beside(cpl_device *dev, void *to, const void *from, size_t bytes) {
    cpl_status st = CPL_OK;
    cpl_cuda *cuda = cpl_cuda_of(dev);
    CPL_TRY(make_beside(cuda));
    CPL_CUDA_TRY("order a copy", cudaEventRecord(cuda->fork, cuda->stream));
    CPL_CUDA_TRY("order a copy", cudaStreamWaitEvent(cuda->beside, cuda->fork, 0));
    CPL_CUDA_TRY("copy beside other work", cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, cuda->beside));
    cuda->copies = true;
done:
    return st;
}

extern "C" cpl_status cpl_cuda_join(cpl_device *dev) {
    cpl_status st = CPL_OK;
    cpl_cuda *cuda = cpl_cuda_of(dev);
    if (cuda->copies) {
        cuda->copies = false;
        CPL_CUDA_TRY("wait for copies", cudaEventRecord(cuda->joined, cuda->beside));
        CPL_CUDA_TRY("wait for copies", cudaStreamWaitEvent(cuda->stream, cuda->joined, 0));
    }
done:
    return st;
}

extern "C" void cpl_cuda_beside_free(cpl_cuda *cuda) {
    if (cuda->beside != NULL) {
        cudaStreamDestroy(cuda->beside);
    }
    if (cuda->joined != NULL) {
        cudaEventDestroy(cuda->joined);
    }
    if (cuda->fork != NULL) {
        cudaEventDestroy(cuda->fork);
    }
}
