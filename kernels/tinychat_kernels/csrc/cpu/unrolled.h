// A loop whose index is a constant in each round, so that arrays of registers stay in registers: compilers unroll the
// loops of a large tile too late for that. Included inside a target region, since nothing else can be inlined there.

#define TINYCHAT_INLINE __attribute__((always_inline))

namespace tinychat {
namespace {

template <int kIndex>
struct Index {
    constexpr operator int() const { return kIndex; }
};

// body(Index<0>()), body(Index<1>()), ...
template <int kCount, class Body>
inline TINYCHAT_INLINE void unrolled(Body&& body) {
    if constexpr (kCount > 0) {
        unrolled<kCount - 1>(body);
        body(Index<kCount - 1>());
    }
}

}  // namespace
}  // namespace tinychat
