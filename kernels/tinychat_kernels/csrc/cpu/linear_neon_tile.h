// Rows times a panel, and what to measure, by the multiply_block and the product of linear_dotprod.cpp or
// linear_i8mm.cpp that stand before it.

namespace tinychat {
namespace {

template <int kRows>
void multiply_tile(const Panel& panel, int64_t first, int64_t count, const Quantized& x, int64_t row, float* sums) {
    const int8_t* values = x.values + row * x.stride + first * panel.quads * 4;
    const int64_t of_group = row * x.groups + first;
    for (int64_t g = 0; g < count; ++g)
        for (int b = 0; b < kPanelBlocks; ++b) {
            int32x4_t dots[kRows][kQuarters];
            begin<kRows>(panel.zeros_of(g, b), x.sums + of_group + g, x.groups, dots);
            multiply_block<kRows>(panel.part(g, b), values + g * panel.quads * 4, x.stride, panel.quads, dots);
            float32x4_t scales[kQuarters];
            unrolled<kQuarters>([&](auto q) TINYCHAT_INLINE { scales[q] = vld1q_f32(panel.scales_of(g, b) + 4 * q); });
            add_group<kRows>(dots, scales, x.scales + of_group + g, x.groups, sums + b * kLanes, kPanelColumns);
        }
}

void multiply(const Panel& panel, int64_t first, int64_t count, const Quantized& x, int64_t row, int64_t rows,
              float* sums) {
    int64_t r = 0;
    for (; r + kTileRows <= rows; r += kTileRows)
        multiply_tile<kTileRows>(panel, first, count, x, row + r, sums + r * kPanelColumns);
    for (; r < rows; ++r) multiply_tile<1>(panel, first, count, x, row + r, sums + r * kPanelColumns);
}

int64_t products(int64_t rounds) {
    constexpr int kSums = 16;
    int32x4_t sums[kSums];
    unrolled<kSums>([&](auto n) TINYCHAT_INLINE { sums[n] = vdupq_n_s32(0); });
    int8x16_t ones = vdupq_n_s8(1);
    for (int64_t i = 0; i < rounds; ++i)
        unrolled<kSums>([&](auto n) TINYCHAT_INLINE {
            asm volatile("" : "+w"(ones));  // so that no product is computed once for all
            sums[n] = product(sums[n], ones);
        });
    unrolled<kSums>([&](auto n) TINYCHAT_INLINE { asm volatile("" ::"w"(sums[n])); });
    return rounds * kSums * kProducts;
}

}  // namespace
}  // namespace tinychat
