/* Exact magnitude pruning over the ranks: which weights go, and what that did.
 * Refuses NaN (named by tensor), and to let any rank see another rank's weights. */
#ifndef CPL_JOBS_SELECT_H
#define CPL_JOBS_SELECT_H

#include "io/record.h"
#include "jobs/options.h"
#include "jobs/store.h"

typedef struct {
    int64_t population; /* N: prunable weights, zeros included */
    int64_t removed;    /* k = floor(sparsity * N); with scope tensor the sum of the tensors' */
    double threshold;   /* magnitude of the k-th smallest; scope tensor: the largest of the tensors'; 0 for k = 0 */
    int64_t ties;       /* weights of exactly that magnitude (scope global) */
    int64_t searched;   /* weights that the last passes went over: fewer than the population where a sample said where to look */
    int64_t *by_tensor; /* owned [layout->count]: weights removed of each tensor */
} cpl_prune_report;
void cpl_prune_report_free(cpl_prune_report *r);

/* Whether tensor p belongs to the population. */
static inline bool cpl_prune_includes(const cpl_prune_options *o, const cpl_param *p) {
    return p->prunable || (o->include == CPL_INCLUDE_ALL && !p->one_d);
}
/* Collective. Removes exactly k weights: all of a key |w| below the k-th smallest's and, among equals, those of the smallest flat
 * index. Sets shard->mask (shard->masked must be) and zeroes shard->param where it is 0. The same mask, bit for bit, for any number
 * of ranks. Radix selection on the 31-bit keys: three histograms of 2^11, 2^10, 2^10 counts, each summed over the ranks. Of a large
 * population a sample says first between which keys to look, one pass lists the weights there, and the histograms are of that list;
 * where the sample misled, of the whole. */
cpl_status cpl_prune_weights(cpl_comm *comm, cpl_device *dev, const cpl_layout *layout, const cpl_prune_options *options,
                             cpl_shard *shard, cpl_prune_report *report);

/* The same for weights that lie on the device, part after part. scratch of its own, for any number of calls; all is borrowed but
 * that. */
typedef struct cpl_selection cpl_selection;
/* w, mask: device [n], elements [begin, begin + n) of the flat buffer. Not collective. Errors: CPL_NO_MEMORY. */
cpl_status cpl_selection_create(cpl_selection **out, cpl_comm *comm, cpl_device *dev, const cpl_layout *layout,
                                const cpl_prune_options *options, int64_t begin, int64_t n, const float *w, uint8_t *mask);
void cpl_selection_destroy(cpl_selection **selection);
/* Device memory of a selection in n elements of the layout. */
int64_t cpl_selection_bytes(const cpl_layout *layout, const cpl_prune_options *options, int64_t n);
/* Collective. Enqueues mask = 0 for the weights that go and 1 for the others of the population; outside of it mask is not touched.
 * The host waits for the histogram of each pass: three times, or five. Fills population, threshold, ties, searched of *report. */
cpl_status cpl_selection_run(cpl_selection *selection, cpl_prune_report *report);

/* Requested and exact sparsity, k, threshold, ties and the share of each tensor that went, into a stage's record. */
cpl_status cpl_prune_record(cpl_record *rec, const cpl_layout *layout, const cpl_prune_options *o, const cpl_prune_report *r);

#endif
