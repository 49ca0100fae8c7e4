// Rows times a panel, by the multiply_block of linear_dotprod.cpp or linear_i8mm.cpp that stands before it.

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

}  // namespace
}  // namespace tinychat
