// One 64-byte vector of floats or doubles by the compiler's vector extensions (GCC, Clang): an
// AVX-512 register where the CPU has them, else as many narrower ones as it takes.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

template <class T>
struct Simd;
template <>
struct Simd<float> {
  using V [[gnu::vector_size(64)]] = float;
  using Loose [[gnu::vector_size(64), gnu::aligned(4), gnu::may_alias]] = float;
  using I [[gnu::vector_size(64)]] = int32_t;
};
template <>
struct Simd<double> {
  using V [[gnu::vector_size(64)]] = double;
  using Loose [[gnu::vector_size(64), gnu::aligned(8), gnu::may_alias]] = double;
  using I [[gnu::vector_size(64)]] = int64_t;
};
template <class T>
using Vec = typename Simd<T>::V;
template <class T>
using Loose = typename Simd<T>::Loose;  // a vector that may lie anywhere among numbers
template <class T>
constexpr int WIDTH = 64 / sizeof(T);

constexpr double LOG2E = 1.4426950408889634;
constexpr double LINEAR_FROM = 20;  // above it softplus is the identity, as in torch

template <class V>
inline V all(double x) {
  return V{} + static_cast<std::remove_reference_t<decltype(V{}[0])>>(x);
}

// Adding this to a float rounds it to an integer n and leaves n + 127, the exponent's bits of 2^n, in
// the low bits.
constexpr float ROUND = 12582912 + 127;

// p 2^n, from n + ROUND; 0 where n < -126.
inline Vec<float> times_power(Vec<float> p, Vec<float> n) {
  const Vec<float> least = all<Vec<float>>(ROUND - 126);
#ifdef __AVX512F__
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n, least, _CMP_NLT_UQ), p, n - ROUND);
#else
  using I = Simd<float>::I;
  p *= reinterpret_cast<Vec<float>>(reinterpret_cast<I>(n) << 23);
  return n < least ? Vec<float>{} : p;
#endif
}

// out[k] = 2^(x[k] y[k]): relative error below 1.7e-7 plus that of rounding x and y to float; 0 below
// 2^-126, infinity from 2^128 on or a little before, NaN stays NaN. 2^0 is exactly 1. Several at once
// keep the processor busy, which would wait for one chain of operations.
template <int K>
inline void exp2_products(const Vec<float>* x, const Vec<float>* y, Vec<float>* out) {
  using V = Vec<float>;
  V n[K], r[K], p[K];
  for (int k = 0; k < K; ++k) n[k] = x[k] * y[k] + ROUND;
  for (int k = 0; k < K; ++k) n[k] = n[k] > ROUND + 128 ? all<V>(ROUND + 128) : n[k];
  for (int k = 0; k < K; ++k) r[k] = x[k] * y[k] - (n[k] - ROUND);  // rounded once; in [-0.5, 0.5]
  for (int k = 0; k < K; ++k) p[k] = 1.3264723820611835e-3f * r[k] + 9.671512991189957e-3f;
  for (int k = 0; k < K; ++k) p[k] = p[k] * r[k] + 5.550733581185341e-2f;
  for (int k = 0; k < K; ++k) p[k] = p[k] * r[k] + 2.4022242426872253e-1f;
  for (int k = 0; k < K; ++k) p[k] = p[k] * r[k] + 6.931470036506653e-1f;
  for (int k = 0; k < K; ++k) p[k] = p[k] * r[k] + 1.0f;
  for (int k = 0; k < K; ++k) out[k] = times_power(p[k], n[k]);
}

template <int K>
inline void exp2_products(const Vec<double>* x, const Vec<double>* y, Vec<double>* out) {
  for (int k = 0; k < K; ++k)
    for (int i = 0; i < WIDTH<double>; ++i) out[k][i] = std::exp2(x[k][i] * y[k][i]);
}

// Each x[k] becomes its exponential.
template <int K, class V>
inline void exp_all(V* x) {
  V log2e[K];
  for (int k = 0; k < K; ++k) log2e[k] = all<V>(LOG2E);
  exp2_products<K>(x, log2e, x);
}

template <class V>
inline V exp(V x) {
  exp_all<1>(&x);
  return x;
}

template <class V>
inline V sigmoid(V x) {
  return 1 / (1 + exp(-x));
}

// log(1 + e) for 0 <= e <= 1 as 2 atanh(e / (2 + e)): relative error below 1e-7.
inline Vec<float> log1p_unit(Vec<float> e) {
  const Vec<float> s = e / (2 + e), y = s * s;
  Vec<float> p = 0.14006422460079193f * y + 0.1400081366300583f;
  p = p * y + 0.20010769367218018f;
  p = p * y + 0.3333320915699005f;
  return 2 * s * (1 + y * p);
}

inline Vec<double> log1p_unit(Vec<double> e) {
  for (int i = 0; i < WIDTH<double>; ++i) e[i] = std::log1p(e[i]);
  return e;
}

template <class V>
inline V softplus(V x) {
  const V positive = x > 0 ? x : V{}, size = x > 0 ? x : -x;
  const V smooth = positive + log1p_unit(exp(-size));
  return x > LINEAR_FROM ? x : smooth;
}

template <class V>
inline V softplus_slope(V x) {
  return x > LINEAR_FROM ? all<V>(1) : sigmoid(x);
}

struct bf16 {
  uint16_t bits;
};

enum Dtype : int64_t { FLOAT32, FLOAT64, BFLOAT16 };  // of a tensor, as in native.py

// Calls f(a number of the dtype of sums, one of the dtype in memory).
template <class F>
inline void with_dtype(int64_t dtype, F f) {
  switch (dtype) {
    case FLOAT32: return f(float{}, float{});
    case FLOAT64: return f(double{}, double{});
    case BFLOAT16: return f(float{}, bf16{});
  }
}

template <class T, class S>
inline T convert(S x) {
  if constexpr (std::is_same_v<S, bf16>) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
  } else if constexpr (std::is_same_v<T, bf16>) {
    const float wide = static_cast<float>(x);
    uint32_t bits;
    std::memcpy(&bits, &wide, 4);
    const uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // ties to even
    return bf16{static_cast<uint16_t>(wide == wide ? nearest : 0x7fc0)};
  } else {
    return static_cast<T>(x);
  }
}

using Half [[gnu::vector_size(32), gnu::aligned(2), gnu::may_alias]] = uint16_t;  // 16 bf16 numbers

inline Vec<float> widen(Half x) {
  using Word [[gnu::vector_size(64)]] = uint32_t;
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(x, Word) << 16);
}

// To nearest, ties to even. The instruction takes numbers below 2^-126 for zero.
inline Half narrow(Vec<float> x) {
#ifdef __AVX512BF16__
  return reinterpret_cast<Half>(_mm512_cvtneps_pbh(x));
#else
  using Word [[gnu::vector_size(64)]] = uint32_t;
  using Exact [[gnu::vector_size(32)]] = uint16_t;
  const Word bits = reinterpret_cast<Word>(x), nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return __builtin_convertvector(x == x ? nearest : Word{} + 0x7fc0, Exact);
#endif
}

using Whole [[gnu::vector_size(64), gnu::aligned(2), gnu::may_alias]] = uint16_t;  // 32 of them

inline Whole narrow(Vec<float> first, Vec<float> second) {
#ifdef __AVX512BF16__
  return reinterpret_cast<Whole>(_mm512_cvtne2ps_pbh(second, first));
#else
  Half halves[2] = {narrow(first), narrow(second)};
  Whole both;
  std::memcpy(&both, halves, sizeof both);
  return both;
#endif
}

// Numbers that lie side by side, anywhere in memory, as a vector.
template <class T, class S>
inline Vec<T> read_vector(const S* from) {
  if constexpr (std::is_same_v<S, T>) return *reinterpret_cast<const Loose<T>*>(from);
  else if constexpr (std::is_same_v<T, float> && std::is_same_v<S, bf16>)
    return widen(*reinterpret_cast<const Half*>(from));
  else {
    Vec<T> x;
    for (int i = 0; i < WIDTH<T>; ++i) x[i] = convert<T>(from[i]);
    return x;
  }
}

template <class T, class S>
inline void write_vector(Vec<T> x, S* to) {
  if constexpr (std::is_same_v<S, T>) *reinterpret_cast<Loose<T>*>(to) = x;
  else if constexpr (std::is_same_v<T, float> && std::is_same_v<S, bf16>)
    *reinterpret_cast<Half*>(to) = narrow(x);
  else
    for (int i = 0; i < WIDTH<T>; ++i) to[i] = convert<S>(x[i]);
}

// first, first + 1, ..., lane by lane.
template <class T>
inline typename Simd<T>::I counting_from(int64_t first) {
  typename Simd<T>::I lane;
  for (int i = 0; i < WIDTH<T>; ++i) lane[i] = first + i;
  return lane;
}

// Transposes a WIDTH x WIDTH square: interleaving row i with row i + WIDTH / 2, log2(WIDTH) times.
template <class T>
inline void transpose(Vec<T>* rows) {
  constexpr int W = WIDTH<T>;
#ifndef __clang__
  typename Simd<T>::I low, high;
  for (int i = 0; i < W; ++i) {
    low[i] = i / 2 + i % 2 * W;
    high[i] = low[i] + W / 2;
  }
#endif
  for (int round = 1; round < W; round *= 2) {
    Vec<T> next[W];
    for (int i = 0; i < W / 2; ++i) {
      const Vec<T> a = rows[i], b = rows[i + W / 2];
#ifdef __clang__
      for (int j = 0; j < W; ++j) {
        next[2 * i][j] = j % 2 ? b[j / 2] : a[j / 2];
        next[2 * i + 1][j] = j % 2 ? b[j / 2 + W / 2] : a[j / 2 + W / 2];
      }
#else
      next[2 * i] = __builtin_shuffle(a, b, low);
      next[2 * i + 1] = __builtin_shuffle(a, b, high);
#endif
    }
    for (int i = 0; i < W; ++i) rows[i] = next[i];
  }
}

// The sum over the lanes of each of WIDTH vectors, as the lanes of one.
template <class T>
inline Vec<T> lane_sums(const Vec<T>* of) {
  Vec<T> rows[WIDTH<T>], sum{};
  for (int i = 0; i < WIDTH<T>; ++i) rows[i] = of[i];
  transpose<T>(rows);
  for (const Vec<T>& row : rows) sum += row;
  return sum;
}

// The lanes of x, each half in the other's place, when `half` lanes make a half.
template <class T>
inline Vec<T> swap_halves(Vec<T> x, int half) {
#ifdef __clang__
  Vec<T> y;
  for (int i = 0; i < WIDTH<T>; ++i) y[i] = x[i ^ half];
  return y;
#else
  typename Simd<T>::I from;
  for (int i = 0; i < WIDTH<T>; ++i) from[i] = i ^ half;
  return __builtin_shuffle(x, from);
#endif
}

template <class T>
inline T lane_sum(Vec<T> x) {
#pragma GCC unroll 4
  for (int half = WIDTH<T> / 2; half; half /= 2) x += swap_halves<T>(x, half);
  return x[0];
}

template <class T>
inline T lane_max(Vec<T> x) {
#pragma GCC unroll 4
  for (int half = WIDTH<T> / 2; half; half /= 2) {
    const Vec<T> y = swap_halves<T>(x, half);
    x = x > y ? x : y;
  }
  return x[0];
}
