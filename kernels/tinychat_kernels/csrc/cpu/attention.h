// Causal attention of new tokens over the cache that they were written to, for all threads of a team.
//
// A query's result has the same bits whatever else is computed with it: keys are taken in blocks of kBlock that start
// at multiples of kBlock, and the blocks' results are merged in order.
#pragma once

#include "floats.h"
#include "pool.h"

namespace tinychat {

// Token t of row r stands at position starts[r] + t, and its keys are in the cache already. It sees the positions up
// to its own, `window` of them at most (0: all).
struct Attention {
    const float* q;  // [rows, count, heads, head_dim], tokens ldq apart
    float* y;        // the same, tokens ldy apart
    const void* keys;  // [slots, kv_heads, capacity, head_dim]
    const void* values;
    const float* key_scales;  // [slots, kv_heads, capacity], of Kind::i8 alone
    const float* value_scales;
    const int32_t* slots;   // [rows]
    const int32_t* starts;  // [rows]
    int64_t ldq, ldy;
    int64_t rows, count;
    int64_t heads, kv_heads, head_dim;
    int64_t capacity;  // tokens of a row of the cache
    int64_t window;
    bool causal = true;  // false: it sees the positions after its own as well
    float scale;
    Kind kind;
    void* memory;    // attention_memory() bytes, aligned to 64
};

// Bytes for so many rows of `count` new tokens, where the longest row then has `longest` tokens.
size_t attention_memory(int64_t rows, int64_t count, int64_t heads, int64_t kv_heads, int64_t head_dim,
                        int64_t longest);

// The result is complete after the next barrier. Uses the team's counter: a barrier comes before it too.
void attention(Team& team, const Attention& a);

}  // namespace tinychat
