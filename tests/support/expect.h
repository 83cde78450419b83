/* What programs of several ranks check with: EXPECT counts what is wrong on this rank, and the end of a test, test_all_ranks as its
 * teardown, tells all. Refuses to leave a test before all ranks know its result, so that a failure is a failure and no hang. */
#ifndef CPL_TESTS_EXPECT_H
#define CPL_TESTS_EXPECT_H

#include "comm/comm.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <cmocka.h>

static cpl_comm *world; /* of main */
static int rank, size;  /* in it */
static int wrong;

#define EXPECT(condition)                                                                                                          \
    do {                                                                                                                           \
        if (!(condition)) {                                                                                                        \
            wrong++;                                                                                                               \
            fprintf(stderr, "rank %d of %d: line %d: %s: '%s'\n", rank, size, __LINE__, #condition, cpl_status_message());         \
        }                                                                                                                          \
    } while (0)
#define EXPECT_OK(call) EXPECT((call) == CPL_OK)

static int test_all_ranks(void **state) {
    int64_t sum = wrong;
    assert_int_equal(cpl_comm_allreduce_i64(world, &sum, 1, CPL_SUM), CPL_OK);
    wrong = 0;
    return sum == 0 ? 0 : -1;
}

#endif
