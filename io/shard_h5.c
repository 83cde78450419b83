/* Our own HDF5 token shard: root attributes format, version, vocab, tokenizer and the 1-D data set "tokens" (u16 or u32), read
 * through hyperslabs and a small chunk cache. Refuses data sets with unwritten parts, outside links and chunks too large to read
 * one at a time. */
#include "io/shard.h"
#include "io/h5.h"
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

struct cpl_shard_h5 {
    hid_t file, set, space; /* owned */
    size_t width;           /* bytes a token, 2 or 4 */
};

enum { LARGEST_CHUNK = 16 << 20 }; /* bytes: a sample reads one or two chunks */

static cpl_status get_attr(hid_t file, const char *path, const char *name, cpl_type type, cpl_ckpt_attr *out, cpl_arena *arena) {
    cpl_status st = cpl_h5_get(file, path, name, out, arena);
    if (st == CPL_NOT_FOUND) {
        CPL_FAIL(CPL_DAMAGED, "%s: attribute \"%s\" of the root is missing, expected format, version, vocab and tokenizer", path,
                 name);
    }
    if (st == CPL_OK && out->type != type) {
        CPL_FAIL(CPL_DAMAGED, "%s: attribute \"%s\" is of another type, expected %s", path, name,
                 type == CPL_T_TEXT ? "text" : "an integer");
    }
done:
    return st;
}

static cpl_status read_attributes(hid_t file, const char *path, int64_t *vocab, char tokenizer[CPL_SHARD_TOKENIZER]) {
    cpl_status st = CPL_OK;
    cpl_arena *arena = NULL;
    cpl_ckpt_attr attr = {0};
    CPL_TRY(cpl_arena_create(&arena));
    CPL_TRY(get_attr(file, path, "format", CPL_T_TEXT, &attr, arena));
    if (strcmp(attr.text, CPL_SHARD_H5_FORMAT) != 0) {
        CPL_FAIL(CPL_INPUT, "%s: attribute \"format\" is \"%.64s\", expected \"%s\"", path, attr.text, CPL_SHARD_H5_FORMAT);
    }
    CPL_TRY(get_attr(file, path, "version", CPL_T_I64, &attr, arena));
    if (attr.i != CPL_SHARD_H5_VERSION) {
        CPL_FAIL(CPL_INPUT, "%s: attribute \"version\" is %lld, expected %d", path, (long long)attr.i, CPL_SHARD_H5_VERSION);
    }
    CPL_TRY(get_attr(file, path, "vocab", CPL_T_I64, &attr, arena));
    if (attr.i < 1 || attr.i > INT32_MAX) {
        CPL_FAIL(CPL_DAMAGED, "%s: attribute \"vocab\" is %lld, expected 1 to %d", path, (long long)attr.i, INT32_MAX);
    }
    *vocab = attr.i;
    CPL_TRY(get_attr(file, path, "tokenizer", CPL_T_TEXT, &attr, arena));
    size_t length = strlen(attr.text);
    if (length == 0 || length >= CPL_SHARD_TOKENIZER) {
        CPL_FAIL(CPL_DAMAGED, "%s: attribute \"tokenizer\" has %zu bytes, expected 1 to %d", path, length, CPL_SHARD_TOKENIZER - 1);
    }
    memcpy(tokenizer, attr.text, length + 1);
done:
    cpl_arena_destroy(&arena);
    return st;
}

static cpl_status open_set(cpl_shard_h5 *h, const char *path, hid_t access) {
    cpl_status st = CPL_OK;
    H5L_info_t link;
    htri_t there = H5Lexists(h->file, CPL_SHARD_H5_DATASET, H5P_DEFAULT);
    CPL_H5(CPL_DAMAGED, there, "%s: cannot look for the data set tokens", path);
    if (there == 0) {
        CPL_FAIL(CPL_DAMAGED, "%s: data set tokens is missing", path);
    }
    CPL_H5(CPL_DAMAGED, H5Lget_info(h->file, CPL_SHARD_H5_DATASET, &link, H5P_DEFAULT), "%s: cannot look at tokens", path);
    if (link.type != H5L_TYPE_HARD) {
        CPL_FAIL(CPL_INPUT, "%s: tokens is a link elsewhere, expected a data set in this file", path);
    }
    CPL_H5(CPL_DAMAGED, h->set = H5Dopen2(h->file, CPL_SHARD_H5_DATASET, access), "%s: tokens cannot be opened as a data set",
           path);
done:
    return st;
}

/* Also h->space and h->width. */
static cpl_status check_shape(cpl_shard_h5 *h, const char *path, int64_t *tokens) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE type = H5I_INVALID_HID;
    hsize_t n = 0;
    CPL_H5(CPL_DAMAGED, type = H5Dget_type(h->set), "%s: cannot read the type of tokens", path);
    CPL_H5(CPL_DAMAGED, h->space = H5Dget_space(h->set), "%s: cannot read the shape of tokens", path);
    h->width = H5Tget_size(type);
    if (H5Tget_class(type) != H5T_INTEGER || H5Tget_sign(type) != H5T_SGN_NONE || (h->width != 2 && h->width != 4)) {
        CPL_FAIL(CPL_INPUT, "%s: data set tokens is of another type, expected unsigned integers of 16 or 32 bits", path);
    }
    if (H5Sget_simple_extent_ndims(h->space) != 1 || H5Sget_simple_extent_dims(h->space, &n, NULL) != 1) {
        CPL_FAIL(CPL_INPUT, "%s: data set tokens is of another shape, expected one dimension", path);
    }
    if (n > INT64_MAX / 8) {
        CPL_FAIL(CPL_DAMAGED, "%s: data set tokens says %llu tokens, expected at most 2^60", path, (unsigned long long)n);
    }
    *tokens = (int64_t)n;
done:
    return st;
}

/* Unwritten parts would read as zeros. *chunk: bytes of a chunk, 0 without chunks. */
static cpl_status check_layout(const cpl_shard_h5 *h, const char *path, int64_t tokens, size_t *chunk) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE create = H5I_INVALID_HID;
    *chunk = 0;
    CPL_H5(CPL_DAMAGED, create = H5Dget_create_plist(h->set), "%s: cannot read the layout of tokens", path);
    H5D_layout_t layout = H5Pget_layout(create);
    if (layout < 0 || layout == H5D_VIRTUAL || H5Pget_external_count(create) != 0) {
        CPL_FAIL(CPL_INPUT, "%s: data set tokens lies in other files, expected in this one", path);
    }
    if (layout == H5D_CHUNKED) {
        hsize_t length = 0, chunks = 0;
        if (H5Pget_chunk(create, 1, &length) != 1 || length == 0 || length > LARGEST_CHUNK / h->width) {
            CPL_FAIL(CPL_UNSUPPORTED, "%s: data set tokens has chunks of %llu tokens, expected 1 to %zu", path,
                     (unsigned long long)length, (size_t)LARGEST_CHUNK / h->width);
        }
        *chunk = (size_t)length * h->width;
        uint64_t expected = ((uint64_t)tokens + length - 1) / length;
        CPL_H5(CPL_DAMAGED, H5Dget_num_chunks(h->set, h->space, &chunks), "%s: cannot count the chunks of tokens", path);
        if (chunks != expected) {
            CPL_FAIL(CPL_DAMAGED, "%s: data set tokens says %lld tokens in %llu chunks, %llu chunks are there", path,
                     (long long)tokens, (unsigned long long)expected, (unsigned long long)chunks);
        }
    } else if (H5Dget_storage_size(h->set) != (hsize_t)tokens * h->width) {
        CPL_FAIL(CPL_DAMAGED, "%s: data set tokens says %lld tokens, %llu are there", path, (long long)tokens,
                 (unsigned long long)(H5Dget_storage_size(h->set) / h->width));
    }
done:
    return st;
}

/* The cache of a data set is chosen when it is opened, its chunks are known only then: opened a second time. */
static cpl_status reopen_with_cache(cpl_shard_h5 *h, const char *path, size_t bytes) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE access = H5I_INVALID_HID;
    cpl_h5_release(&h->set);
    CPL_H5(CPL_HDF5, access = H5Pcreate(H5P_DATASET_ACCESS), "%s: cannot set the chunk cache", path);
    CPL_H5(CPL_HDF5, H5Pset_chunk_cache(access, 1009 /* slots, a prime */, bytes, 0.75), "%s: cannot set the chunk cache", path);
    CPL_TRY(open_set(h, path, access));
done:
    return st;
}

cpl_status cpl_shard_h5_open(cpl_shard_h5 **out, const char *path, size_t cache, int64_t *tokens, int64_t *vocab,
                             char tokenizer[CPL_SHARD_TOKENIZER]) {
    cpl_status st = CPL_OK;
    size_t chunk = 0;
    cpl_shard_h5 *h = NULL;
    CPL_TRY(cpl_h5_begin());
    CPL_TRY(cpl_alloc(&h, 1, sizeof *h, "an HDF5 token shard"));
    *h = (cpl_shard_h5){H5I_INVALID_HID, H5I_INVALID_HID, H5I_INVALID_HID, 0};
    CPL_TRY(cpl_h5_open(path, &h->file));
    CPL_TRY(read_attributes(h->file, path, vocab, tokenizer));
    CPL_TRY(open_set(h, path, H5P_DEFAULT));
    CPL_TRY(check_shape(h, path, tokens));
    CPL_TRY(check_layout(h, path, *tokens, &chunk));
    if (chunk != 0) {
        CPL_TRY(reopen_with_cache(h, path, cache > 2 * chunk ? cache : 2 * chunk));
    }
done:
    if (st != CPL_OK) {
        cpl_shard_h5_close(&h);
    }
    *out = h;
    return st;
}

void cpl_shard_h5_close(cpl_shard_h5 **h) {
    if (h == NULL || *h == NULL) {
        return;
    }
    cpl_h5_release(&(*h)->space);
    cpl_h5_release(&(*h)->set);
    cpl_h5_release(&(*h)->file);
    cpl_free(h);
}

/* [n] u16 in the upper half of out become [n] int32. Element i is written to bytes 4i to 4i + 3, the next one is read from byte
 * 2n + 2i + 2 on: nothing is overwritten before it was read. */
static void widen(int32_t *out, size_t n) {
    const char *in = (const char *)out + 2 * n;
    for (size_t i = 0; i < n; i++) {
        uint16_t token;
        memcpy(&token, in + 2 * i, sizeof token);
        out[i] = token;
    }
}

/* In the file's own width, as HDF5 clears a buffer of 1 MiB for each conversion, 20 times the work of reading a sample; and
 * unsigned, as a signed type would make tokens over 2^31 - 1 into others. */
cpl_status cpl_shard_h5_read(const cpl_shard_h5 *h, const char *path, int64_t first, int64_t n, int32_t *out) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE memory = H5I_INVALID_HID;
    hsize_t start = (hsize_t)first, count = (hsize_t)n;
    if (n == 0) {
        goto done;
    }
    CPL_H5(CPL_HDF5, memory = H5Screate_simple(1, &count, NULL), "%s: cannot select %lld tokens", path, (long long)n);
    CPL_H5(CPL_HDF5, H5Sselect_hyperslab(h->space, H5S_SELECT_SET, &start, NULL, &count, NULL), "%s: cannot select %lld tokens",
           path, (long long)n);
    char *into = (char *)out + (h->width == 2 ? 2 * (size_t)n : 0);
    CPL_H5(CPL_DAMAGED, H5Dread(h->set, h->width == 2 ? H5T_NATIVE_UINT16 : H5T_NATIVE_UINT32, memory, h->space, H5P_DEFAULT, into),
           "%s: cannot read tokens %lld to %lld", path, (long long)first, (long long)(first + n - 1));
    if (h->width == 2) {
        widen(out, (size_t)n);
    }
done:
    return st;
}

struct cpl_shard_h5_writer {
    const char *path;       /* borrowed */
    hid_t file, set, space; /* owned */
    int64_t tokens, written;
};

static cpl_status create_set(cpl_shard_h5_writer *w, int64_t vocab) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE create = H5I_INVALID_HID;
    hsize_t n = (hsize_t)w->tokens, chunk = n < CPL_SHARD_H5_CHUNK ? n : CPL_SHARD_H5_CHUNK;
    hid_t type = vocab <= CPL_SHARD_U16_VOCAB ? H5T_STD_U16LE : H5T_STD_U32LE;
    CPL_H5(CPL_HDF5, create = H5Pcreate(H5P_DATASET_CREATE), "%s: cannot create tokens", w->path);
    CPL_H5(CPL_HDF5, H5Pset_chunk(create, 1, &chunk), "%s: cannot create tokens", w->path);
    CPL_H5(CPL_HDF5, H5Pset_fletcher32(create), "%s: cannot create tokens", w->path);
    /* The same tokens give the same bytes. */
    CPL_H5(CPL_HDF5, H5Pset_obj_track_times(create, false), "%s: cannot create tokens", w->path);
    CPL_H5(CPL_HDF5, w->space = H5Screate_simple(1, &n, NULL), "%s: cannot create tokens", w->path);
    CPL_H5(CPL_HDF5, w->set = H5Dcreate2(w->file, CPL_SHARD_H5_DATASET, type, w->space, H5P_DEFAULT, create, H5P_DEFAULT),
           "%s: cannot create tokens", w->path);
done:
    return st;
}

static cpl_status create_file(cpl_shard_h5_writer *w, int64_t vocab, const char *tokenizer) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE access = H5I_INVALID_HID;
    CPL_TRY(cpl_h5_begin());
    CPL_TRY(cpl_h5_access(&access, NULL));
    CPL_TRY(cpl_h5_create(w->path, access, &w->file));
    CPL_TRY(cpl_h5_put_text(w->file, w->path, "format", CPL_SHARD_H5_FORMAT, true));
    CPL_TRY(cpl_h5_put_i64(w->file, w->path, "version", CPL_SHARD_H5_VERSION));
    CPL_TRY(cpl_h5_put_i64(w->file, w->path, "vocab", vocab));
    CPL_TRY(cpl_h5_put_text(w->file, w->path, "tokenizer", tokenizer, true));
    CPL_TRY(create_set(w, vocab));
done:
    return st;
}

/* HDF5 1.10 keeps what it could not write: closing fails, is tried again at exit and crashes there. What is to be dropped anyway
 * goes to a file in memory instead, which takes it. */
static void write_no_more(hid_t file) {
    void *handle = NULL; /* of the POSIX driver: its int file descriptor */
    int sink = memfd_create("dropped", MFD_CLOEXEC);
    if (sink >= 0 && file >= 0 && H5Fget_vfd_handle(file, H5P_DEFAULT, &handle) >= 0 && handle != NULL) {
        (void)dup2(sink, *(const int *)handle);
    }
    if (sink >= 0) {
        (void)close(sink); /* nothing is to be kept */
    }
}

void cpl_shard_h5_drop(cpl_shard_h5_writer **w) {
    if (w == NULL || *w == NULL) {
        return;
    }
    write_no_more((*w)->file);
    cpl_h5_release(&(*w)->space);
    cpl_h5_release(&(*w)->set);
    cpl_h5_release(&(*w)->file);
    cpl_free(w);
}

/* A file in memory is under this limit too, so it is looked at before. */
static cpl_status check_size_limit(const char *path, int64_t tokens, int64_t vocab) {
    cpl_status st = CPL_OK;
    struct rlimit limit;
    int64_t chunks =
        (tokens - 1) / CPL_SHARD_H5_CHUNK + 1; /* a chunk has 4 bytes of checksum, 16 of index; the file 4 KiB of the rest */
    int64_t bytes = chunks * (CPL_SHARD_H5_CHUNK * (vocab <= CPL_SHARD_U16_VOCAB ? 2 : 4) + 20) + 4096;
    if (getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY && (uint64_t)bytes > limit.rlim_cur) {
        CPL_FAIL(CPL_IO, "%s: File too large: about %lld bytes, expected at most %llu (ulimit -f)", path, (long long)bytes,
                 (unsigned long long)limit.rlim_cur);
    }
done:
    return st;
}

cpl_status cpl_shard_h5_create(cpl_shard_h5_writer **out, const char *path, int64_t tokens, int64_t vocab, const char *tokenizer) {
    cpl_status st = CPL_OK;
    cpl_shard_h5_writer *w = NULL;
    CPL_TRY(cpl_alloc(&w, 1, sizeof *w, "a writer of HDF5 token shards"));
    *w = (cpl_shard_h5_writer){path, H5I_INVALID_HID, H5I_INVALID_HID, H5I_INVALID_HID, tokens, 0};
    CPL_TRY(check_size_limit(path, tokens, vocab));
    CPL_TRY(create_file(w, vocab, tokenizer));
done:
    if (st != CPL_OK) {
        cpl_shard_h5_drop(&w);
    }
    *out = w;
    return st;
}

cpl_status cpl_shard_h5_append(cpl_shard_h5_writer *w, const int32_t *tokens, int64_t n) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE memory = H5I_INVALID_HID;
    hsize_t start = (hsize_t)w->written, count = (hsize_t)n;
    if (n < 0 || n > w->tokens - w->written) {
        CPL_FAIL(CPL_INTERNAL, "%s: %lld tokens after %lld, expected %lld in all", w->path, (long long)n, (long long)w->written,
                 (long long)w->tokens);
    }
    if (n == 0) {
        goto done;
    }
    CPL_H5(CPL_HDF5, memory = H5Screate_simple(1, &count, NULL), "%s: cannot select %lld tokens", w->path, (long long)n);
    CPL_H5(CPL_HDF5, H5Sselect_hyperslab(w->space, H5S_SELECT_SET, &start, NULL, &count, NULL), "%s: cannot select %lld tokens",
           w->path, (long long)n);
    CPL_H5(CPL_HDF5, H5Dwrite(w->set, H5T_NATIVE_INT32, memory, w->space, H5P_DEFAULT, tokens),
           "%s: cannot write tokens %lld to %lld", w->path, (long long)w->written, (long long)(w->written + n - 1));
    w->written += n;
done:
    return st;
}

cpl_status cpl_shard_h5_finish(cpl_shard_h5_writer **w) {
    cpl_status st = CPL_OK;
    const char *path = (*w)->path;
    /* Everything is written while all handles are whole: what fails here can be dropped in order. */
    CPL_H5(CPL_HDF5, H5Fflush((*w)->file, H5F_SCOPE_GLOBAL), "%s: cannot be written", path);
    cpl_h5_release(&(*w)->space);
    CPL_H5(CPL_HDF5, H5Dclose((*w)->set), "%s: cannot finish tokens", path);
    (*w)->set = H5I_INVALID_HID;
    CPL_TRY(cpl_h5_close(&(*w)->file, path));
    if ((*w)->written != (*w)->tokens) {
        CPL_FAIL(CPL_INTERNAL, "%s: %lld tokens were written, expected %lld", path, (long long)(*w)->written,
                 (long long)(*w)->tokens);
    }
done:
    cpl_shard_h5_drop(w);
    return st;
}
