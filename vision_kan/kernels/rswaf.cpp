// FasterKAN's basis on a CPU, for a grid that is symmetric about its middle m (every uniform one is).
//
// Points m + d and m - d form a pair. With z = 2(u - m)/h, s = exp(-|z|), w = s/(1 + s^2) and T = tanh(z):
//
//     B+ + B- = w (x + y w) / Q(w)        Q(w) = a + b w + g w^2
//     B+ - B- = w T c / Q(w)
//
// a, b, g, x, y, c are constants of the pair (`pair_constants` in basis.py has them and the derivation); the middle point of
// an odd number is a pair with y = c = g = 0. All terms of Q are positive. One exponential and, for up to four
// pairs, two divisions give all values. Derivatives: dw/dz = -w T, dT/dz = 4 w^2.
//
// Plain C functions, called through ctypes.
// Compiled for one number of grid points, POINTS, and either for one base function of the activation, BASE, or without
// BASE for the basis: only what a model needs.
#include "simd.h"

namespace {

constexpr int P = (POINTS + 1) / 2; // pairs
constexpr bool MIDDLE = POINTS % 2; // the last of them is a single point
constexpr int SHARED = 4;           // pairs that share a division; more could overflow
enum Base { NONE, IDENTITY, GELU, SILU, RELU, RELU2 };

}  // namespace

struct Pair { float a, b, g, x, y, c; };

namespace {

// The constants of every pair, a lane each: operands that instructions can take from memory as they are.
struct Constants {
    F a[P], b[P], g[P], g2[P], x[P], y[P], c[P];

    explicit Constants(const Pair* pairs) {
        for (int j = 0; j < P; j++) {
            a[j] = all(pairs[j].a), b[j] = all(pairs[j].b), g[j] = all(pairs[j].g), g2[j] = g[j] + g[j];
            x[j] = all(pairs[j].x), y[j] = all(pairs[j].y), c[j] = all(pairs[j].c);
        }
    }
};

// ---------------------------------------------------------------- functions
// exp(-x) for x >= 0; below 2^-125 it stays there, so that nothing turns into a denormal number.
inline F exp_minus(F x) {
    F t = x * -1.44269504f;
    t = t < -125.0f ? all(-125.0f) : t;
    F n = (t + 12582912.0f) - 12582912.0f;              // nearest integer
    F f = t - n, f2 = f * f;                            // [-1/2, 1/2]
    // 2^f, Taylor to the sixth power, in pairs: a short chain of operations
    F p = (1.0f + 6.9314718e-1f * f) + f2 * ((2.4022651e-1f + 5.5504109e-2f * f)
                                             + f2 * ((9.6181291e-3f + 1.3333558e-3f * f) + f2 * 1.5403530e-4f));
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

// A tree over N pairs from FIRST, each node the product of the Q below it; nodes[0] is the whole.
template <int FIRST, int N>
inline F products(F w, const Constants& of, F* nodes) {
    if constexpr (N == 1) nodes[0] = (of.g[FIRST] * w + of.b[FIRST]) * w + of.a[FIRST];
    else nodes[0] = products<FIRST, N - N / 2>(w, of, nodes + 1) * products<FIRST + N - N / 2, N / 2>(w, of, nodes + 2 * (N - N / 2));
    return nodes[0];
}

// out[j] = 1/Q_j, from the inverse of the whole and the tree.
template <int N>
inline void shares(F inverse, const F* nodes, F* out) {
    constexpr int half = N - N / 2;
    if constexpr (N == 1) { out[0] = inverse; return; }
    else {
        shares<half>(inverse * nodes[2 * half], nodes + 1, out);
        shares<N / 2>(inverse * nodes[1], nodes + 2 * half, out + half);
    }
}

// 1/Q of every pair.
template <int FIRST = 0>
inline void reciprocals(F w, const Constants& of, F* out) {
    constexpr int n = P - FIRST < SHARED ? P - FIRST : SHARED;
    F nodes[2 * n];
    shares<n>(1.0f / products<FIRST, n>(w, of, nodes), nodes, out + FIRST);
    if constexpr (FIRST + n < P) reciprocals<FIRST + n>(w, of, out);
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
        // Phi(u) - 1/2 and gelu'(u) - 1/2 are odd: u P(u^2)/Q(u^2), fitted to 4e-9, 3e-7 in float32's arithmetic;
        // beyond `far` they are 1/2 to that accuracy.
        constexpr float far = SLOPE ? 6.0f : 5.2f;
        F c = u < -far ? all(-far) : u > far ? all(far) : u;
        F x = c * c, x2 = x * x, p, q;
        if (SLOPE) {
            p = (((all(1.70434191e-08f) * x2 + 3.4091976e-05f) * x2 + 0.0138575025f) * x2 + 0.797884524f)
                + x * ((all(9.2229817e-07f) * x2 + 0.000202653377f) * x2 - 0.0223754253f);
            q = (((all(3.38901003e-07f) * x2 + 0.000245303614f) * x2 + 0.0441320501f) * x2 + 1.0f)
                + x * (((all(1.3145971e-09f) * x2 + 1.03067887e-05f) * x2 + 0.00397129171f) * x2 + 0.305289537f);
        } else {
            p = ((all(6.40765575e-06f) * x2 + 0.00460860413f) * x2 + 0.398942262f)
                + x * ((all(2.47301273e-08f) * x2 + 0.000156855633f) * x2 + 0.0325441658f);
            q = ((all(7.04932245e-05f) * x2 + 0.0279264227f) * x2 + 1.0f)
                + x * ((all(1.25882275e-06f) * x2 + 0.00181716855f) * x2 + 0.248242468f);
        }
        F half = c * p / q;
        if (SLOPE) return absolute(u) > far ? (u > 0.0f ? one : zero) : 0.5f + half;
        return absolute(u) > far ? (u > 0.0f ? u : zero) : u * (0.5f + half);
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

struct Fraction { F top, bottom; };

// sum of N_j/Q_j over N pairs, N_j = x_j + y_j w + c_j T, over one denominator.
template <int FIRST, int N>
inline Fraction fraction(Point p, const Constants& of, const Lanes& k) {
    if constexpr (N == 1) {
        return {k.x[FIRST] + k.y[FIRST] * p.w + k.c[FIRST] * p.t, (of.g[FIRST] * p.w + of.b[FIRST]) * p.w + of.a[FIRST]};
    } else {
        Fraction one = fraction<FIRST, N - N / 2>(p, of, k), other = fraction<FIRST + N - N / 2, N / 2>(p, of, k);
        return {one.top * other.bottom + other.top * one.bottom, one.bottom * other.bottom};
    }
}

template <int FIRST>
inline F fractions(Point p, const Constants& of, const Lanes& k) {
    constexpr int n = P - FIRST < SHARED ? P - FIRST : SHARED;
    Fraction some = fraction<FIRST, n>(p, of, k);
    if constexpr (FIRST + n < P) return some.top / some.bottom + fractions<FIRST + n>(p, of, k);
    else return some.top / some.bottom;
}

// Rows are worked on STRIP at a time, one stage after the other: a stage's chain of dependent operations is short
// enough for the processor to work on several rows at once.
template <bool FULL, typename T>
inline void activation_rows(const T* u, T* v, int64_t rows, int64_t channels, int n, const Lanes& lanes,
                            const Constants& constants, float middle, float rate) {
    const Lanes k = lanes;
    const Constants of = constants;
    Point p[STRIP];
    F value[STRIP];
    for (int64_t first = 0; first < rows; first += STRIP, u += STRIP * channels, v += STRIP * channels) {
        int count = rows - first < STRIP ? rows - first : STRIP;
        for (int i = 0; i < count; i++) {
            __builtin_prefetch(u + (STRIP + i) * channels);
            value[i] = load<FULL>(u + i * channels, n);
            p[i] = locate(value[i], middle, rate);
        }
        for (int i = 0; i < count; i++) {
            F sum = p[i].w * fractions<0>(p[i], of, k);
            if (BASE == NONE) store<FULL>(v + i * channels, sum, n);
            else p[i].w = sum;
        }
        if (BASE != NONE)
            for (int i = 0; i < count; i++) store<FULL>(v + i * channels, p[i].w + k.scale * base<false>(value[i]), n);
    }
}

template <typename T>
void activation(const T* u, T* v, int64_t rows, int64_t channels, const float* coefficients, const float* scales,
                int64_t groups, const Pair* pairs, float middle, float rate) {
    const Constants of(pairs);
    each_tile(rows, channels, [&](int64_t channel, int n, int64_t at, int64_t count, int64_t) {
        Lanes k(coefficients, scales, pairs, channel, n, channels / groups);
        if (n == LANES) activation_rows<true>(u + at, v + at, count, channels, n, k, of, middle, rate);
        else activation_rows<false>(u + at, v + at, count, channels, n, k, of, middle, rate);
    });
}

constexpr int SUMS = 3 * P + 1;

template <bool FULL, bool SCALED, typename T>
inline void activation_grad_rows(const T* dv, const T* u, T* du, int64_t rows, int64_t channels, int n, const Lanes& lanes,
                                 const Constants& constants, float middle, float rate, F* out) {
    const Lanes k = lanes;
    const Constants of = constants;
    F sums[SUMS], value[STRIP], slope[STRIP], r[STRIP][P];
    Point p[STRIP];
    for (int j = 0; j < SUMS; j++) sums[j] = all(0.0f);
    for (int64_t first = 0; first < rows; first += STRIP) {
        int count = rows - first < STRIP ? rows - first : STRIP;
        for (int i = 0; i < count; i++) {
            __builtin_prefetch(u + (STRIP + i) * channels);
            __builtin_prefetch(dv + (STRIP + i) * channels);
            value[i] = load<FULL>(u + i * channels, n);
            p[i] = locate(value[i], middle, rate);
        }
        for (int i = 0; i < count; i++) reciprocals(p[i].w, of, r[i]);
        for (int i = 0; i < count; i++) {
            F in_w = all(0.0f), even = all(0.0f), odd = all(0.0f);     // of d(sum)/dw, the sum, d(sum)/dT
            for (int j = 0; j < P; j++) {
                F top = r[i][j] * (k.x[j] + k.y[j] * p[i].w + k.c[j] * p[i].t);
                even += top;
                odd += r[i][j] * k.c[j];
                in_w += r[i][j] * (k.y[j] - top * (of.b[j] + of.g2[j] * p[i].w));
            }
            slope[i] = rate * p[i].w * (4.0f * p[i].w * p[i].w * odd - p[i].t * (even + p[i].w * in_w));
        }
        if (BASE != NONE)
            for (int i = 0; i < count; i++) slope[i] += k.scale * base<true>(value[i]);
        for (int i = 0; i < count; i++) {
            F g = load<FULL>(dv + i * channels, n), gw = g * p[i].w, gww = gw * p[i].w, gwt = gw * p[i].t;
            for (int j = 0; j < P; j++) {
                sums[3 * j] += gw * r[i][j];
                sums[3 * j + 1] += gww * r[i][j];
                sums[3 * j + 2] += gwt * r[i][j];
            }
            if (BASE != NONE && SCALED) sums[3 * P] += g * base<false>(value[i]);
            store<FULL>(du + i * channels, g * slope[i], n);
        }
        u += STRIP * channels, dv += STRIP * channels, du += STRIP * channels;
    }
    memcpy(out, sums, sizeof sums);
}

template <typename T>
void activation_grad(const T* dv, const T* u, T* du, int64_t rows, int64_t channels, const float* coefficients,
                     const float* scales, int64_t groups, const Pair* pairs, float middle, float rate,
                     double* dc, double* dscale) {
    int64_t blocks = (rows + BLOCK - 1) / BLOCK, chunks = (channels + LANES - 1) / LANES;
    const Constants of(pairs);
    std::vector<F> partial(blocks * chunks * SUMS);
    each_tile(rows, channels, [&](int64_t channel, int n, int64_t at, int64_t count, int64_t tile) {
        F* out = &partial[tile * SUMS];
        Lanes k(coefficients, scales, pairs, channel, n, channels / groups);
        #define ROWS(FULL, SCALED) activation_grad_rows<FULL, SCALED>(dv + at, u + at, du + at, count, channels, n, k, of, \
                                                                      middle, rate, out)
        if (n != LANES) ROWS(false, true); else if (dscale) ROWS(true, true); else ROWS(true, false);
        #undef ROWS
    });
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
// POINTS values of LANES channels, in memory [channels, POINTS]: the order of the weight's columns.
template <bool FULL, typename O>
inline void put(O* to, const F* values, int n) {
    O rows[POINTS][LANES];
    for (int k = 0; k < POINTS; k++) store<true>(rows[k], values[k], LANES);
    for (int lane = 0; lane < (FULL ? LANES : n); lane++)
        for (int k = 0; k < POINTS; k++) to[lane * POINTS + k] = rows[k][lane];
}

template <bool FULL, typename O>
inline void get(const O* from, F* values, int n) {
    O rows[POINTS][LANES] = {};
    for (int lane = 0; lane < (FULL ? LANES : n); lane++)
        for (int k = 0; k < POINTS; k++) rows[k][lane] = from[lane * POINTS + k];
    for (int k = 0; k < POINTS; k++) values[k] = load<true>(rows[k], LANES);
}

template <bool FULL, typename T, typename O>
inline void basis_at(const T* u, O* out, int n, const Constants& of, float middle, float rate) {
    F r[P], values[POINTS];
    Point p = locate(load<FULL>(u, n), middle, rate);
    reciprocals(p.w, of, r);
    F half = 0.5f * p.w;
    for (int j = 0; j < P; j++) {
        F even = half * r[j] * (of.x[j] + of.y[j] * p.w), odd = half * r[j] * (of.c[j] * p.t);
        values[POINTS - 1 - j] = even + odd;
        values[j] = MIDDLE && j == P - 1 ? even + even : even - odd;
    }
    put<FULL>(out, values, n);
}

// `in_out` has the gradient of the basis, and then the basis.
template <bool FULL, typename T, typename O>
inline void basis_grad_at(O* in_out, const T* u, T* du, int n, const Constants& of, float middle, float rate) {
    F r[P], values[POINTS], in_w = all(0.0f), even = all(0.0f), odd = all(0.0f);
    Point p = locate(load<FULL>(u, n), middle, rate);
    reciprocals(p.w, of, r);
    get<FULL>(in_out, values, n);
    F half = 0.5f * p.w;
    for (int j = 0; j < P; j++) {
        bool single = MIDDLE && j == P - 1;
        F up = values[POINTS - 1 - j], down = values[j];
        F e = single ? up + up : up + down, c = (up - down) * of.c[j];      // twice the even and the odd half
        F shape = r[j] * (of.x[j] + of.y[j] * p.w), tilt = r[j] * of.c[j] * p.t;
        F top = e * shape + r[j] * c * p.t;
        even += top;
        odd += r[j] * c;
        in_w += r[j] * (e * of.y[j] - top * (of.b[j] + of.g2[j] * p.w));
        values[POINTS - 1 - j] = half * (shape + tilt);
        values[j] = single ? p.w * shape : half * (shape - tilt);
    }
    put<FULL>(in_out, values, n);
    store<FULL>(du, rate * half * (4.0f * p.w * p.w * odd - p.t * (even + p.w * in_w)), n);
}

// out [rows, channels, G] from u [rows, channels].
template <typename T, typename O>
void basis(const T* u, O* out, int64_t rows, int64_t channels, const Pair* pairs, float middle, float rate) {
    const Constants of(pairs);
    #pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T* from = u + row * channels;
        O* to = out + row * POINTS * channels;
        int64_t i = 0;
        for (; i + LANES <= channels; i += LANES)
            basis_at<true>(from + i, to + i * POINTS, LANES, of, middle, rate);
        if (i < channels) basis_at<false>(from + i, to + i * POINTS, channels - i, of, middle, rate);
    }
}

// du [rows, channels] from the gradient of the basis, laid out as the basis, by which it is overwritten.
template <typename T, typename O>
void basis_grad(O* in_out, const T* u, T* du, int64_t rows, int64_t channels, const Pair* pairs, float middle, float rate) {
    const Constants of(pairs);
    #pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T* from = u + row * channels;
        T* to = du + row * channels;
        O* at = in_out + row * POINTS * channels;
        int64_t i = 0;
        for (; i + LANES <= channels; i += LANES)
            basis_grad_at<true>(at + i * POINTS, from + i, to + i, LANES, of, middle, rate);
        if (i < channels)
            basis_grad_at<false>(at + i * POINTS, from + i, to + i, channels - i, of, middle, rate);
    }
}
#endif

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
