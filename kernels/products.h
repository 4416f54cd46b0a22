// Products of small matrices in registers, and how rows of tensors are laid out for them.
//
// Matrices of vectors have rows of whole vectors; what stands behind the last column is zero.
#pragma once

#include "lanes.h"

// A tensor (batch, time, heads or groups, width), the numbers of a token side by side.
struct Tokens {
  void* data;
  int64_t batch, time;
};

constexpr int ROWS = 6, COLUMNS = 4;  // rows and vectors of sums that AVX-512's registers hold

// c (R, V) = a (R, depth) b (depth, V), or added to what c holds. `down` and `along` are the steps
// of a from row to row and from column to column; pitches of b and c count vectors.
template <class T, int R, int V, bool ADD>
inline void product_of(const T* a, int64_t down, int64_t along, const Vec<T>* b, int64_t b_pitch,
                       Vec<T>* c, int64_t c_pitch, int64_t depth) {
  Vec<T> sum[R][V];
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < V; ++j) sum[i][j] = ADD ? c[i * c_pitch + j] : Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> row[V];
    for (int j = 0; j < V; ++j) row[j] = b[k * b_pitch + j];
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
      const T x = a[i * down + k * along];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sum[i][j] += x * row[j];
    }
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < V; ++j) c[i * c_pitch + j] = sum[i][j];
}

// As product_of, of any number of rows.
template <class T, int V, bool ADD>
inline void product_down(const T* a, int64_t down, int64_t along, const Vec<T>* b, int64_t b_pitch,
                         Vec<T>* c, int64_t c_pitch, int64_t rows, int64_t depth) {
  int64_t i = 0;
  for (; i + ROWS <= rows; i += ROWS)
    product_of<T, ROWS, V, ADD>(a + i * down, down, along, b, b_pitch, c + i * c_pitch, c_pitch, depth);
  for (; i + 2 <= rows; i += 2)
    product_of<T, 2, V, ADD>(a + i * down, down, along, b, b_pitch, c + i * c_pitch, c_pitch, depth);
  if (i < rows)
    product_of<T, 1, V, ADD>(a + i * down, down, along, b, b_pitch, c + i * c_pitch, c_pitch, depth);
}

// As product_of, of any number of rows and vectors.
template <class T, bool ADD>
void product(const T* a, int64_t down, int64_t along, const Vec<T>* b, int64_t b_pitch, Vec<T>* c,
             int64_t c_pitch, int64_t rows, int64_t vectors, int64_t depth) {
  int64_t j = 0;
  for (; j + COLUMNS <= vectors; j += COLUMNS)
    product_down<T, COLUMNS, ADD>(a, down, along, b + j, b_pitch, c + j, c_pitch, rows, depth);
  for (; j + 2 <= vectors; j += 2)
    product_down<T, 2, ADD>(a, down, along, b + j, b_pitch, c + j, c_pitch, rows, depth);
  if (j < vectors) product_down<T, 1, ADD>(a, down, along, b + j, b_pitch, c + j, c_pitch, rows, depth);
}

template <class T>
constexpr int64_t vectors_of(int64_t width) {
  return (width + WIDTH<T> - 1) / WIDTH<T>;
}

// `width` numbers times `scale` as whole vectors.
template <class T, class S>
inline void load_row(const S* from, int64_t width, Vec<T>* to, T scale = 1) {
  T* out = reinterpret_cast<T*>(to);
  int64_t i = 0;
  for (; i + WIDTH<T> <= width; i += WIDTH<T>) to[i / WIDTH<T>] = read_vector<T>(from + i) * scale;
  for (; i < width; ++i) out[i] = convert<T>(from[i]) * scale;
  for (i = width; i < vectors_of<T>(width) * WIDTH<T>; ++i) out[i] = 0;
}

template <class T, class S>
inline void store_row(const Vec<T>* from, int64_t width, S* to, T scale = 1) {
  const T* in = reinterpret_cast<const T*>(from);
  int64_t i = 0;
  for (; i + WIDTH<T> <= width; i += WIDTH<T>) write_vector<T>(from[i / WIDTH<T>] * scale, to + i);
  for (; i < width; ++i) to[i] = convert<S>(in[i] * scale);
}

// to (vectors WIDTH, groups) = the transpose of from (groups WIDTH, vectors).
template <class T>
inline void turn(const Vec<T>* from, int64_t vectors, int64_t groups, Vec<T>* to) {
  constexpr int W = WIDTH<T>;
  for (int64_t j = 0; j < vectors; ++j)
    for (int64_t g = 0; g < groups; ++g) {
      Vec<T> square[W];
      for (int i = 0; i < W; ++i) square[i] = from[(g * W + i) * vectors + j];
      transpose<T>(square);
      for (int i = 0; i < W; ++i) to[(j * W + i) * groups + g] = square[i];
    }
}

template <class T>
inline T inner_product(const Vec<T>* a, const Vec<T>* b, int64_t vectors) {
  Vec<T> sum{};
  for (int64_t i = 0; i < vectors; ++i) sum += a[i] * b[i];
  return lane_sum<T>(sum);
}
