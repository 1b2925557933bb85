// What the CPU kernels share: vectors, memory, tiles. Written with the vector extensions of GCC and Clang, which lower to whatever
// the machine has. Sums over rows are taken in blocks of a fixed size and added in a fixed order, so a result does not depend on
// the number of threads.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// Floats worked on at once: a register's; wider vectors would be lowered to single floats.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int BLOCK = 128;          // rows whose sums are added in float32
constexpr int STRIP = 8;            // rows that a stage works on
typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES)));

inline F all(float value) { return F{} + value; }

inline F absolute(F x) { return (F)((I)x & 0x7fffffff); }

// ---------------------------------------------------------------- memory: float32 or bfloat16, n <= LANES of them
inline F widen(H half) { return (F)(__builtin_convertvector(half, I) << 16); }

inline H narrow(F value) {          // round to nearest even, as PyTorch does
    I bits = (I)value;
    I rounded = (I)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
    I nan = (I)(value != value);
    return __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), H);
}

// FULL: n == LANES, known when compiled, so that nothing goes through memory once more.
template <bool FULL>
inline F load(const float* from, int n) {
    F value{};
    memcpy(&value, from, FULL ? sizeof value : 4 * n);
    return value;
}

template <bool FULL>
inline F load(const uint16_t* from, int n) {
    H half{};
    memcpy(&half, from, FULL ? sizeof half : 2 * n);
    return widen(half);
}

template <bool FULL>
inline void store(float* to, F value, int n) { memcpy(to, &value, FULL ? sizeof value : 4 * n); }

template <bool FULL>
inline void store(uint16_t* to, F value, int n) {
    H half = narrow(value);
    memcpy(to, &half, FULL ? sizeof half : 2 * n);
}

// ---------------------------------------------------------------- tiles
// tile(first channel, channels, where it begins, rows, its number) for every BLOCK rows of LANES channels, or of what is left.
template <typename Fn>
void each_tile(int64_t rows, int64_t channels, Fn tile) {
    int64_t blocks = (rows + BLOCK - 1) / BLOCK, chunks = (channels + LANES - 1) / LANES;
    #pragma omp parallel for collapse(2) schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            int64_t channel = chunk * LANES, row = block * BLOCK;
            int n = channels - channel < LANES ? channels - channel : LANES;
            int64_t count = rows - row < BLOCK ? rows - row : BLOCK;
            tile(channel, n, row * channels + channel, count, block * chunks + chunk);
        }
    }
}

template <typename Fn>
void with_type(int half, Fn fn) { if (half) fn(uint16_t()); else fn(float()); }

}  // namespace
