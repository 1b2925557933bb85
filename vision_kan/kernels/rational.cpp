// v = P(u)/Q(u) and its gradients on a CPU: P = sum_{k=0..DEGREE} a_k u^k, Q = 1 + sum_{k=1..BELOW} b_k |u|^k, b_k >= 0.
//
// With g = dv/Q the gradient of u is g (P' - v Q'), that of a_k the sum of g u^k, that of b_k the sum of -g v |u|^k.
//
// Plain C functions, called through ctypes. Compiled for one pair of degrees.
#include "simd.h"

namespace {

constexpr int COUNT = DEGREE + 1 + BELOW;

// The coefficients of LANES channels.
struct Lanes {
    F a[DEGREE + 1], b[BELOW];

    Lanes(const float* coefficients, int64_t channel, int n, int64_t per_group) {
        for (auto& each : a) each = all(0.0f);
        for (auto& each : b) each = all(0.0f);
        for (int lane = 0; lane < n; lane++) {
            const float* own = coefficients + (channel + lane) / per_group * COUNT;
            for (int k = 0; k <= DEGREE; k++) a[k][lane] = own[k];
            for (int k = 0; k < BELOW; k++) b[k][lane] = own[DEGREE + 1 + k];
        }
    }
};

inline F top(F x, const Lanes& of) {
    F value = of.a[DEGREE];
    for (int k = DEGREE - 1; k >= 0; k--) value = value * x + of.a[k];
    return value;
}

inline F bottom(F x, const Lanes& of) {     // x >= 0
    F value = of.b[BELOW - 1];
    for (int k = BELOW - 2; k >= 0; k--) value = value * x + of.b[k];
    return value * x + 1.0f;
}

inline F top_slope(F x, const Lanes& of) {
    F value = (float)DEGREE * of.a[DEGREE];
    for (int k = DEGREE - 1; k >= 1; k--) value = value * x + (float)k * of.a[k];
    return value;
}

inline F bottom_slope(F x, const Lanes& of) {
    F value = (float)BELOW * of.b[BELOW - 1];
    for (int k = BELOW - 1; k >= 1; k--) value = value * x + (float)k * of.b[k - 1];
    return value;
}

template <bool FULL, typename T>
inline void value_rows(const T* u, T* v, int64_t rows, int64_t channels, int n, const Lanes& lanes) {
    const Lanes of = lanes;
    for (int64_t row = 0; row < rows; row++, u += channels, v += channels) {
        __builtin_prefetch(u + STRIP * channels);
        F x = load<FULL>(u, n);
        store<FULL>(v, top(x, of) / bottom(absolute(x), of), n);
    }
}

template <bool FULL, typename T>
inline void gradient_rows(const T* dv, const T* u, T* du, int64_t rows, int64_t channels, int n, const Lanes& lanes, F* out) {
    const Lanes of = lanes;
    F sums[COUNT];
    for (auto& sum : sums) sum = all(0.0f);
    for (int64_t row = 0; row < rows; row++, dv += channels, u += channels, du += channels) {
        __builtin_prefetch(u + STRIP * channels);
        __builtin_prefetch(dv + STRIP * channels);
        F x = load<FULL>(u, n), size = absolute(x), inverse = 1.0f / bottom(size, of);
        F g = load<FULL>(dv, n) * inverse, v = top(x, of) * inverse;
        F side = (F)((I)bottom_slope(size, of) ^ ((I)x & (int32_t)0x80000000));
        store<FULL>(du, g * (top_slope(x, of) - v * side), n);
        F power = g, below = -g * v;
        for (int k = 0; k <= DEGREE; k++) sums[k] += power, power *= x;
        for (int k = 0; k < BELOW; k++) below *= size, sums[DEGREE + 1 + k] += below;
    }
    memcpy(out, sums, sizeof sums);
}

template <typename T>
void gradients(const T* dv, const T* u, T* du, int64_t rows, int64_t channels, const float* coefficients, int64_t groups,
               double* dc) {
    int64_t blocks = (rows + BLOCK - 1) / BLOCK, chunks = (channels + LANES - 1) / LANES, per_group = channels / groups;
    std::vector<F> partial(blocks * chunks * COUNT);
    each_tile(rows, channels, [&](int64_t channel, int n, int64_t at, int64_t count, int64_t tile) {
        Lanes of(coefficients, channel, n, per_group);
        F* out = &partial[tile * COUNT];
        if (n == LANES) gradient_rows<true>(dv + at, u + at, du + at, count, channels, n, of, out);
        else gradient_rows<false>(dv + at, u + at, du + at, count, channels, n, of, out);
    });
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t channel = 0; channel < channels; channel++)
            for (int k = 0; k < COUNT; k++)
                dc[channel / per_group * COUNT + k] += partial[(block * chunks + channel / LANES) * COUNT + k][channel % LANES];
}

}  // namespace

// ---------------------------------------------------------------- what ctypes calls; `half`: bfloat16, else float32
extern "C" {

void rational(const void* u, void* v, int half, int64_t rows, int64_t channels, const float* coefficients, int64_t groups) {
    with_type(half, [&](auto type) {
        using T = decltype(type);
        each_tile(rows, channels, [&](int64_t channel, int n, int64_t at, int64_t count, int64_t) {
            Lanes of(coefficients, channel, n, channels / groups);
            if (n == LANES) value_rows<true>((const T*)u + at, (T*)v + at, count, channels, n, of);
            else value_rows<false>((const T*)u + at, (T*)v + at, count, channels, n, of);
        });
    });
}

void rational_grad(const void* dv, const void* u, void* du, int half, int64_t rows, int64_t channels, const float* coefficients,
                   int64_t groups, double* dc) {
    with_type(half, [&](auto type) {
        using T = decltype(type);
        gradients((const T*)dv, (const T*)u, (T*)du, rows, channels, coefficients, groups, dc);
    });
}

}
