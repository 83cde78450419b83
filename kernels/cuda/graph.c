/* Marks in the stream, and what it enqueues recorded as a graph.
 * Refuses to record what would take memory: that must have run once before. */
#include "kernels/cuda/cuda.h"
#include <string.h>

struct cpl_graph {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    bool counted; /* among the device's graphs */
};

static cpl_status make_mark(cpl_cuda *cuda, int slot) {
    cpl_status st = CPL_OK;
    cudaEvent_t *grown = NULL;
    if (slot >= cuda->marks) {
        int marks = slot + 1 > 2 * cuda->marks ? slot + 1 : 2 * cuda->marks;
        CPL_TRY(cpl_alloc(&grown, (size_t)marks, sizeof *grown, "marks"));
        if (cuda->marks > 0) {
            memcpy(grown, cuda->mark, (size_t)cuda->marks * sizeof *grown);
        }
        cpl_free(&cuda->mark);
        cuda->mark = grown;
        cuda->marks = marks;
    }
    CPL_CUDA_TRY("make an event", cudaEventCreate(&cuda->mark[slot]));
done:
    return st;
}

static cudaEvent_t mark_of(const cpl_cuda *cuda, int slot) {
    return slot < cuda->marks ? cuda->mark[slot] : NULL;
}

cpl_status cpl_cuda_mark(cpl_device *dev, int slot) {
    cpl_status st = CPL_OK;
    cpl_cuda *cuda = cpl_cuda_of(dev);
    if (mark_of(cuda, slot) == NULL) {
        CPL_TRY(make_mark(cuda, slot));
    }
    CPL_CUDA_TRY("mark", cudaEventRecord(cuda->mark[slot], cuda->stream));
done:
    return st;
}

cpl_status cpl_cuda_wait_mark(cpl_device *dev, int slot) {
    cudaEvent_t event = mark_of(cpl_cuda_of(dev), slot);
    return event == NULL ? CPL_OK : cpl_cuda_status(cudaEventSynchronize(event), __FILE__, __LINE__, "wait for the GPU");
}

cpl_status cpl_cuda_mark_ms(cpl_device *dev, int from, int to, double *ms) {
    cpl_status st = CPL_OK;
    float elapsed = 0;
    cudaEvent_t begin = mark_of(cpl_cuda_of(dev), from), end = mark_of(cpl_cuda_of(dev), to);
    if (begin == NULL || end == NULL) {
        CPL_FAIL(CPL_INTERNAL, "time between marks %d and %d: expected both to be set", from, to);
    }
    CPL_CUDA_TRY("read the GPU's clock", cudaEventElapsedTime(&elapsed, begin, end));
    *ms = (double)elapsed;
done:
    return st;
}

cpl_status cpl_cuda_over_mark(cpl_device *dev, int slot, bool *over) {
    cudaEvent_t event = mark_of(cpl_cuda_of(dev), slot);
    cudaError_t error = event == NULL ? cudaSuccess : cudaEventQuery(event);
    *over = error == cudaSuccess;
    return error == cudaErrorNotReady ? CPL_OK : cpl_cuda_status(error, __FILE__, __LINE__, "wait for the GPU");
}

void cpl_cuda_marks_free(cpl_cuda *cuda) {
    for (int i = 0; i < cuda->marks; i++) {
        if (cuda->mark[i] != NULL) {
            cudaEventDestroy(cuda->mark[i]);
        }
    }
    cpl_free(&cuda->mark);
}

/* --- graphs --- */

void cpl_cuda_forget(cpl_device *dev, cpl_graph *graph) {
    cpl_cuda *cuda = cpl_cuda_of(dev);
    if (graph->counted && --cuda->graphs == 0) {
        cpl_cuda_free_outgrown(dev);
    }
    if (graph->exec != NULL) {
        cudaGraphExecDestroy(graph->exec);
    }
    if (graph->graph != NULL) {
        cudaGraphDestroy(graph->graph);
    }
    cpl_free(&graph);
}

cpl_status cpl_cuda_record(cpl_device *dev, cpl_status (*body)(void *context), void *context, cpl_graph **out) {
    cpl_status st = CPL_OK;
    cpl_cuda *cuda = cpl_cuda_of(dev);
    cpl_graph *g = NULL;
    CPL_TRY(cpl_alloc(&g, 1, sizeof *g, "graph"));
    CPL_CUDA_TRY("record a graph", cudaStreamBeginCapture(cuda->stream, cudaStreamCaptureModeThreadLocal));
    cuda->recording = true;
    st = body(context);
    cuda->recording = false;
    cudaError_t ended = cudaStreamEndCapture(cuda->stream, &g->graph);
    CPL_TRY(st);
    CPL_CUDA_TRY("record a graph", ended);
    CPL_CUDA_TRY("prepare a recorded graph", cudaGraphInstantiate(&g->exec, g->graph, 0));
    CPL_CUDA_TRY("prepare a recorded graph", cudaGraphUpload(g->exec, cuda->stream));
    g->counted = true;
    cuda->graphs++;
    *out = g;
    g = NULL;
done:
    if (g != NULL) {
        (void)cudaGetLastError();
        cpl_cuda_forget(dev, g);
    }
    return st;
}

cpl_status cpl_cuda_replay(cpl_device *dev, cpl_graph *graph) {
    return cpl_cuda_status(cudaGraphLaunch(graph->exec, cpl_cuda_stream(dev)), __FILE__, __LINE__, "replay a graph");
}
