/* A device for tests of the data plane, whose memory the host cannot read by accident: every byte is stored inverted. One of its
 * copies can fail. Refuses all operations but upload and download. */
#ifndef CPL_TESTS_CODED_DEVICE_H
#define CPL_TESTS_CODED_DEVICE_H

#include "kernels/kernels.h"
#include <string.h>

static int coded_done, coded_fails;

/* Inverts the bytes of x where dev is a coded device: host values become device values and back. */
static void coded_flip(const cpl_device *dev, void *x, size_t bytes) {
    unsigned char *p = x;
    for (size_t i = 0; strcmp(dev->kind, "coded") == 0 && i < bytes; i++) {
        p[i] = (unsigned char)~p[i];
    }
}

static cpl_status coded_copy(cpl_device *dev, void *to, const void *from, size_t bytes) {
    coded_done++;
    if (coded_done == coded_fails) {
        return cpl_fail(CPL_DEVICE, __FILE__, __LINE__, "copy %d failed", coded_done);
    }
    memcpy(to, from, bytes);
    coded_flip(dev, to, bytes);
    return CPL_OK;
}

/* fails: which copy fails, counted from 1; -1: none. */
static cpl_device coded_device(int fails) {
    static const cpl_ops ops = {.upload = coded_copy, .download = coded_copy};
    coded_done = 0;
    coded_fails = fails;
    return (cpl_device){.ops = &ops, .kind = "coded"};
}

static int coded_copies(const cpl_device *dev) {
    return strcmp(dev->kind, "coded") == 0 ? coded_done : 0;
}

#endif
