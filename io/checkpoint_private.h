/* What writing and reading checkpoints share: the names of the format.
 * Refuses to be included outside io/checkpoint*.c. */
#ifndef CPL_IO_CHECKPOINT_PRIVATE_H
#define CPL_IO_CHECKPOINT_PRIVATE_H

#define CPL_CKPT_FORMAT "cupel-checkpoint"
enum {
    CPL_CKPT_VERSION = 1,
    CPL_CKPT_CHUNK = 65536 /* elements: 256 KiB of f32; a multiple of 4096, at multiples of which parts of ranks mostly begin */
};

#endif
