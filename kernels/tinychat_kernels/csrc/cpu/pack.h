// Weights as checkpoints hold them -> blocks. See blocks.h for the layout, tinychat.h for the arguments.
#pragma once

#include "pool.h"
#include "tinychat.h"

namespace tinychat {

size_t packed_size(const tc_weights& w);

void pack_w4(Team& team, const tc_weights& w, const int32_t* qweight, const int32_t* qzeros, const void* scales,
             int64_t source_group, void* blocks);

void pack_w8(Team& team, const tc_weights& w, const int8_t* values, const void* scales, void* blocks);

}  // namespace tinychat
