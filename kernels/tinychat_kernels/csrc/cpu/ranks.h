// Sums and joins over processes on one machine, through memory that they share.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "tinychat.h"

#ifdef __cplusplus
extern "C" {
#endif

// The shared memory: a control block for each rank, then two buffers for each; zeros at first.
#define TC_RANK_CONTROL 128
#define TC_RANK_MARK 64  // 16 bytes of a control block from here on are free for whoever sets the memory up

// A rank's place in it, of one thread at a time; turn, done and waiting are zeros at first.
typedef struct tc_ranks {
    void* memory;  // tc_ranks_memory() bytes, aligned to 64
    int64_t rank;
    int64_t size;
    int64_t piece;    // bytes of a buffer, a multiple of 64
    int64_t spin;     // nanoseconds in which another is looked for before this thread sleeps
    int64_t done;     // bytes of each rank's tensor that the present call is through with
    uint32_t turn;    // the last one that this rank has published
    int32_t waiting;  // whether the others' pieces of this turn are still waited for
} tc_ranks;

enum tc_ranks_state {
    TC_RANKS_DONE,
    TC_RANKS_NOT_YET,      // the time is up: the same call with the same arguments goes on
    TC_RANKS_OUT_OF_STEP,  // another rank has brought another number of bytes
};

TINYCHAT_EXPORT size_t tc_ranks_memory(int64_t size, int64_t piece);

// x [count], as `kind` of enum tc_scale says, but for TC_I8 = the sum of every rank's x: added in float32 in the order
// of the ranks and rounded once, so that it has the same bits on all. All calls return after some `nanoseconds`.
TINYCHAT_EXPORT int tc_ranks_sum(tc_ranks* ranks, void* x, int64_t count, int32_t kind, int64_t nanoseconds);

// y [rows, all widths] = every rank's x [rows, its width] side by side; widths [size] are in bytes.
TINYCHAT_EXPORT int tc_ranks_gather(tc_ranks* ranks, const void* x, const int64_t* widths, int64_t rows, void* y,
                                    int64_t nanoseconds);

#ifdef __cplusplus
}
#endif
