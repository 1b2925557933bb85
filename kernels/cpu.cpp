// FasterKAN's basis on a CPU, for a grid that is symmetric about its middle m (every uniform one is).
//
// Points m + d and m - d form a pair. With z = 2(u - m)/h, s = exp(-|z|), w = s/(1 + s^2) and T = tanh(z):
//
//     B+ + B- = w (x + y w) / Q(w)        Q(w) = a + b w + g w^2
//     B+ - B- = w T c / Q(w)
//
// a, b, g, x, y, c are constants of the pair (`Pairs` in basis.py has them and the derivation); the middle point of
// an odd number is a pair with y = c = g = 0. All terms of Q are positive. One exponential and, for up to four
// pairs, two divisions give all values. Derivatives: dw/dz = -w T, dT/dz = 4 w^2.
//
// Plain C functions, called through ctypes; written with the vector extensions of GCC and Clang, which lower to
// whatever the machine has. Sums over rows are taken in blocks of a fixed size and added in a fixed order, so a
// result does not depend on the number of threads.
// Compiled for one number of grid points, POINTS, and either for one base function of the activation, BASE, or without
// BASE for the basis: only what a model needs.
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;           // floats worked on at once
#else
constexpr int LANES = 8;
#endif
constexpr int BLOCK = 128;          // rows whose sums are kept in registers
constexpr int P = (POINTS + 1) / 2; // pairs
constexpr bool MIDDLE = POINTS % 2; // the last of them is a single point
constexpr int SHARED = 4;           // pairs that share a division; more could overflow
typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES)));

enum Base { NONE, IDENTITY, GELU, SILU, RELU, RELU2 };

}  // namespace

struct Pair { float a, b, g, x, y, c; };

namespace {

inline F all(float value) { return F{} + value; }

// ---------------------------------------------------------------- memory: float32 or bfloat16, n <= LANES of them
inline F widen(H half) { return (F)(__builtin_convertvector(half, I) << 16); }

inline H narrow(F value) {          // round to nearest even, as PyTorch does
    I bits = (I)value;
    I rounded = (I)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
    I nan = (I)(value != value);
    return __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), H);
}

inline F load(const float* from, int n) {
    F value{};
    if (n == LANES) memcpy(&value, from, sizeof value); else memcpy(&value, from, 4 * n);
    return value;
}

inline F load(const uint16_t* from, int n) {
    H half{};
    if (n == LANES) memcpy(&half, from, sizeof half); else memcpy(&half, from, 2 * n);
    return widen(half);
}

inline void store(float* to, F value, int n) {
    if (n == LANES) memcpy(to, &value, sizeof value); else memcpy(to, &value, 4 * n);
}

inline void store(uint16_t* to, F value, int n) {
    H half = narrow(value);
    if (n == LANES) memcpy(to, &half, sizeof half); else memcpy(to, &half, 2 * n);
}

// ---------------------------------------------------------------- functions
inline F absolute(F x) { return (F)((I)x & 0x7fffffff); }

// exp(-x) for x >= 0; below 2^-125 it stays there, so that nothing turns into a denormal number.
inline F exp_minus(F x) {
    F t = x * -1.44269504f;
    t = t < -125.0f ? all(-125.0f) : t;
    F n = (t + 12582912.0f) - 12582912.0f;              // nearest integer
    F f = t - n;                                        // [-1/2, 1/2]
    F p = all(1.5403530e-4f);                           // 2^f, Taylor to the sixth power
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return (F)((I)p + (__builtin_convertvector(n, I) << 23));
}

struct Point { F w, t; };           // w and T of the header

inline Point locate(F u, float middle, float rate) {        // rate = 2/h
    F z = (u - middle) * rate;
    F s = exp_minus(absolute(z));
    F r = 1.0f / (1.0f + s * s);
    F t = (1.0f - s * s) * r;
    return {s * r, (F)((I)t | ((I)z & (int32_t)0x80000000))};
}

// 1/Q of every pair.
inline void reciprocals(F w, const Pair* pairs, F* out) {
    for (int first = 0; first < P; first += SHARED) {
        constexpr int most = P < SHARED ? P : SHARED;
        int n = P - first < SHARED ? P - first : SHARED;
        F q[most], before[most];
        F product = all(1.0f);
        for (int j = 0; j < n; j++) {
            const Pair& pair = pairs[first + j];
            q[j] = (pair.g * w + pair.b) * w + pair.a;
            before[j] = product;
            product = j ? product * q[j] : q[j];
        }
        F inverse = 1.0f / product;
        for (int j = n - 1; j > 0; j--) {
            out[first + j] = inverse * before[j];
            inverse = inverse * q[j];
        }
        out[first] = inverse;
    }
}

// ---------------------------------------------------------------- the activation
#ifdef BASE
// base(u), or its derivative where SLOPE.
template <bool SLOPE>
inline F base(F u) {
    F one = all(1.0f), zero = all(0.0f);
    if (BASE == IDENTITY) return SLOPE ? one : u;
    if (BASE == RELU) return u > 0.0f ? (SLOPE ? one : u) : (u == u ? zero : u);
    if (BASE == RELU2) { F r = u > 0.0f ? u : (u == u ? zero : u); return SLOPE ? 2.0f * r : r * r; }
    if (BASE == SILU) {
        F e = exp_minus(absolute(u)), r = 1.0f / (1.0f + e);
        F gate = u >= 0.0f ? r : e * r;
        return SLOPE ? gate * (1.0f + u * (1.0f - gate)) : u * gate;
    }
    if (BASE == GELU) {
        // Phi(-v) = exp(-v^2/2) P(t), t = 1/(1 + 0.3 v): P is a fit to erfcx(v/sqrt(2))/2, error below 1e-7.
        F v = absolute(u), e = exp_minus(0.5f * u * u), t = 1.0f / (1.0f + 0.3f * v);
        F p = all(0.0517855734f);
        p = p * t - 0.3240785f;
        p = p * t + 0.708521724f;
        p = p * t - 0.550057471f;
        p = p * t + 0.483523041f;
        p = p * t - 0.0137940831f;
        p = p * t + 0.146419555f;
        p = p * t - 0.00231990381f;
        F tail = e * p;
        F phi = u >= 0.0f ? 1.0f - tail : tail;
        return SLOPE ? phi + u * e * 0.39894228f : u * phi;
    }
    return zero;
}

// Coefficients of LANES channels: even and odd half of every pair, times the pair's constants.
struct Lanes {
    F x[P], y[P], c[P], scale;

    Lanes(const float* coefficients, const float* scales, const Pair* pairs, int64_t channel, int n,
          int64_t per_group) {
        scale = all(1.0f);
        for (int j = 0; j < P; j++) x[j] = y[j] = c[j] = all(0.0f);
        for (int lane = 0; lane < n; lane++) {
            int64_t group = (channel + lane) / per_group;
            const float* own = coefficients + group * POINTS;
            for (int j = 0; j < P; j++) {
                int low = j, high = POINTS - 1 - j;
                float even = low == high ? own[low] : 0.5f * (own[high] + own[low]);
                float odd = low == high ? 0.0f : 0.5f * (own[high] - own[low]);
                x[j][lane] = even * pairs[j].x;
                y[j][lane] = even * pairs[j].y;
                c[j][lane] = odd * pairs[j].c;
            }
            if (scales) scale[lane] = scales[group];
        }
    }
};

template <typename T>
void activation(const T* u, T* v, int64_t rows, int64_t channels, const float* coefficients, const float* scales,
                int64_t groups, const Pair* pairs, float middle, float rate) {
    int64_t blocks = (rows + BLOCK - 1) / BLOCK, chunks = (channels + LANES - 1) / LANES;
    #pragma omp parallel for collapse(2) schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            int64_t channel = chunk * LANES, last = block * BLOCK + BLOCK < rows ? block * BLOCK + BLOCK : rows;
            int n = channels - channel < LANES ? channels - channel : LANES;
            Lanes k(coefficients, scales, pairs, channel, n, channels / groups);
            for (int64_t row = block * BLOCK; row < last; row++) {
                int64_t at = row * channels + channel;
                __builtin_prefetch(u + at + 8 * channels);
                F value = load(u + at, n), r[P], sum = all(0.0f);
                Point p = locate(value, middle, rate);
                reciprocals(p.w, pairs, r);
                for (int j = 0; j < P; j++) sum += r[j] * (k.x[j] + k.y[j] * p.w + k.c[j] * p.t);
                sum *= p.w;
                if (BASE != NONE) sum += k.scale * base<false>(value);
                store(v + at, sum, n);
            }
        }
    }
}

template <typename T>
void activation_grad(const T* dv, const T* u, T* du, int64_t rows, int64_t channels, const float* coefficients,
                     const float* scales, int64_t groups, const Pair* pairs, float middle, float rate,
                     double* dc, double* dscale) {
    constexpr int SUMS = 3 * P + 1;
    int64_t blocks = (rows + BLOCK - 1) / BLOCK, chunks = (channels + LANES - 1) / LANES;
    std::vector<F> partial(blocks * chunks * SUMS);
    #pragma omp parallel for collapse(2) schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            int64_t channel = chunk * LANES, last = block * BLOCK + BLOCK < rows ? block * BLOCK + BLOCK : rows;
            int n = channels - channel < LANES ? channels - channel : LANES;
            Lanes k(coefficients, scales, pairs, channel, n, channels / groups);
            F sums[SUMS];
            for (int j = 0; j < SUMS; j++) sums[j] = all(0.0f);
            for (int64_t row = block * BLOCK; row < last; row++) {
                int64_t at = row * channels + channel;
                __builtin_prefetch(u + at + 8 * channels);
                __builtin_prefetch(dv + at + 8 * channels);
                F value = load(u + at, n), g = load(dv + at, n), r[P];
                Point p = locate(value, middle, rate);
                reciprocals(p.w, pairs, r);
                F gw = g * p.w;
                F in_w = all(0.0f), even = all(0.0f), odd = all(0.0f);     // of d(sum)/dw, the sum, d(sum)/dT
                for (int j = 0; j < P; j++) {
                    F top = r[j] * (k.x[j] + k.y[j] * p.w + k.c[j] * p.t);
                    even += top;
                    odd += r[j] * k.c[j];
                    in_w += r[j] * (k.y[j] - top * (pairs[j].b + 2.0f * pairs[j].g * p.w));
                    F share = gw * r[j];
                    sums[3 * j] += share;
                    sums[3 * j + 1] += share * p.w;
                    sums[3 * j + 2] += share * p.t;
                }
                F slope = rate * (4.0f * p.w * p.w * p.w * odd - p.t * p.w * (even + p.w * in_w));
                if (BASE != NONE) slope += k.scale * base<true>(value);
                if (BASE != NONE && dscale) sums[3 * P] += g * base<false>(value);
                store(du + at, g * slope, n);
            }
            memcpy(&partial[(block * chunks + chunk) * SUMS], sums, sizeof sums);
        }
    }
    for (int64_t block = 0; block < blocks; block++) {
        for (int64_t channel = 0; channel < channels; channel++) {
            const F* sums = &partial[(block * chunks + channel / LANES) * SUMS];
            int lane = channel % LANES;
            int64_t group = channel / (channels / groups);
            double* own = dc + group * POINTS;
            for (int j = 0; j < P; j++) {
                int low = j, high = POINTS - 1 - j;
                double even = (double)pairs[j].x * sums[3 * j][lane] + (double)pairs[j].y * sums[3 * j + 1][lane];
                double odd = (double)pairs[j].c * sums[3 * j + 2][lane];
                if (low == high) { own[low] += even; continue; }
                own[high] += 0.5 * (even + odd);
                own[low] += 0.5 * (even - odd);
            }
            if (dscale) dscale[group] += sums[3 * P][lane];
        }
    }
}

#else
// ---------------------------------------------------------------- the basis of a full-edge layer
// out [rows, G, channels] from u [rows, channels].
template <typename T, typename O>
void basis(const T* u, O* out, int64_t rows, int64_t channels, const Pair* pairs, float middle, float rate) {
    #pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t channel = 0; channel < channels; channel += LANES) {
            int n = channels - channel < LANES ? channels - channel : LANES;
            F r[P];
            Point p = locate(load(u + row * channels + channel, n), middle, rate);
            reciprocals(p.w, pairs, r);
            O* to = out + row * POINTS * channels + channel;
            for (int j = 0; j < P; j++) {
                int low = j, high = POINTS - 1 - j;
                F wr = p.w * r[j], even = wr * (pairs[j].x + pairs[j].y * p.w), odd = wr * p.t * pairs[j].c;
                if (low == high) { store(to + low * channels, even, n); continue; }
                store(to + high * channels, 0.5f * (even + odd), n);
                store(to + low * channels, 0.5f * (even - odd), n);
            }
        }
    }
}

// du [rows, channels] from the gradient [rows, G, channels] of the basis, which is overwritten by the basis.
template <typename T, typename O>
void basis_grad(O* values, const T* u, T* du, int64_t rows, int64_t channels, const Pair* pairs, float middle,
                float rate) {
    #pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t channel = 0; channel < channels; channel += LANES) {
            int n = channels - channel < LANES ? channels - channel : LANES;
            F r[P], in_w = all(0.0f), even = all(0.0f), odd = all(0.0f);
            Point p = locate(load(u + row * channels + channel, n), middle, rate);
            reciprocals(p.w, pairs, r);
            O* at = values + row * POINTS * channels + channel;
            for (int j = 0; j < P; j++) {
                O *low = at + j * channels, *high = at + (POINTS - 1 - j) * channels;
                F up = load(high, n), down = load(low, n), wr = p.w * r[j];
                F sum = wr * (pairs[j].x + pairs[j].y * p.w), difference = wr * p.t * pairs[j].c;
                F e = low == high ? up : 0.5f * (up + down), c = 0.5f * (up - down) * pairs[j].c;
                F top = r[j] * (e * (pairs[j].x + pairs[j].y * p.w) + c * p.t);
                even += top;
                odd += r[j] * c;
                in_w += r[j] * (e * pairs[j].y - top * (pairs[j].b + 2.0f * pairs[j].g * p.w));
                if (low == high) { store(low, sum, n); continue; }
                store(high, 0.5f * (sum + difference), n);
                store(low, 0.5f * (sum - difference), n);
            }
            store(du + row * channels + channel,
                  rate * (4.0f * p.w * p.w * p.w * odd - p.t * p.w * (even + p.w * in_w)), n);
        }
    }
}

#endif

template <typename Fn>
void with_type(int half, Fn fn) { if (half) fn(uint16_t()); else fn(float()); }

}  // namespace

// ---------------------------------------------------------------- what ctypes calls; `half`: bfloat16, else float32
extern "C" {

#ifdef BASE
void rswaf_activation(const void* u, void* v, int half, int64_t rows, int64_t channels, const float* coefficients,
                      const float* scales, int64_t groups, const Pair* pairs, float middle, float rate) {
    with_type(half, [&](auto type) {
        using T = decltype(type);
        activation((const T*)u, (T*)v, rows, channels, coefficients, scales, groups, pairs, middle, rate);
    });
}

void rswaf_activation_grad(const void* dv, const void* u, void* du, int half, int64_t rows, int64_t channels,
                           const float* coefficients, const float* scales, int64_t groups, const Pair* pairs,
                           float middle, float rate, double* dc, double* dscale) {
    with_type(half, [&](auto type) {
        using T = decltype(type);
        activation_grad((const T*)dv, (const T*)u, (T*)du, rows, channels, coefficients, scales, groups, pairs, middle,
                        rate, dc, dscale);
    });
}
#else
void rswaf_basis(const void* u, int u_half, void* out, int out_half, int64_t rows, int64_t channels, const Pair* pairs,
                 float middle, float rate) {
    with_type(u_half, [&](auto from) { with_type(out_half, [&](auto to) {
        basis((const decltype(from)*)u, (decltype(to)*)out, rows, channels, pairs, middle, rate);
    }); });
}

void rswaf_basis_grad(void* values, int values_half, const void* u, int u_half, void* du, int64_t rows, int64_t channels,
                      const Pair* pairs, float middle, float rate) {
    with_type(u_half, [&](auto type) { with_type(values_half, [&](auto of) {
        basis_grad((decltype(of)*)values, (const decltype(type)*)u, (decltype(type)*)du, rows, channels, pairs, middle,
                   rate);
    }); });
}
#endif

}
