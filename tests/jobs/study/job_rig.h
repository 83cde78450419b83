/* Jobs from text, for the tests of jobs/study.
 * Refuses jobs that should be read but are not: the test fails with their message. */
#ifndef CPL_TESTS_JOBS_STUDY_JOB_RIG_H
#define CPL_TESTS_JOBS_STUDY_JOB_RIG_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "io/base/hash.h"
#include "jobs/study/grid.h"
#include "jobs/study/job.h"
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* Reads text as the file "job.yaml" of the working folder, which is removed again. */
static inline cpl_status rig_read(const char *text, const cpl_setting *settings, size_t n, cpl_job **job) {
    FILE *f = fopen("job.yaml", "w");
    assert_non_null(f);
    assert_true(fputs(text, f) >= 0);
    assert_int_equal(fclose(f), 0);
    cpl_status st = cpl_job_read(job, "job.yaml", settings, n);
    assert_int_equal(unlink("job.yaml"), 0);
    return st;
}

static inline cpl_job *rig_job(const char *text) {
    cpl_job *job = NULL;
    if (rig_read(text, NULL, 0, &job) != CPL_OK) {
        fail_msg("%s", cpl_status_message());
    }
    return job;
}

/* Refused, with exactly this line. */
static inline void rig_refuse(const char *text, const cpl_setting *settings, size_t n, const char *message) {
    cpl_job *job = NULL;
    assert_int_equal(rig_read(text, settings, n, &job), CPL_USAGE);
    assert_null(job);
    assert_string_equal(cpl_status_message(), message);
}

/* Of everything in a stage that a result depends on. */
static inline void rig_stage_hash(const cpl_stage *s, char hex[CPL_SHA256_HEX]) {
    cpl_sha256 h;
    cpl_sha256_init(&h);
    cpl_sha256_add_text(&h, s->kind->name);
    assert_int_equal(cpl_fields_hash(s->kind->table->fields, s->kind->table->count, s->options, &h), CPL_OK);
    if (s->kind->hash != NULL) {
        assert_int_equal(s->kind->hash(s, &h), CPL_OK);
    }
    cpl_sha256_end(&h, hex);
}

#endif
