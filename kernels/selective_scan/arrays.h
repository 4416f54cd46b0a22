// Pieces of torch tensors of any strides and dtype as vectors over channels (or states), and back.
#pragma once

#include "lanes.h"

// A tensor (batch, row, time) or (batch, group, row, time); rows are channels or states. Strides
// count elements; `data` is null for a tensor that is not given. Laid out as in cpp.py.
struct Array {
  void* data;
  int64_t dtype, batch, group, row, time;
};

// Rows row .. row + rows, rows <= WIDTH, and steps start .. start + steps of one batch and group.
struct Piece {
  int64_t batch, group, row, start;
  int rows, steps;
};

template <class S>
S* address(const Array& array, const Piece& at) {
  return static_cast<S*>(array.data) + at.batch * array.batch + at.group * array.group +
         at.row * array.row + at.start * array.time;
}

// out[t * pitch + lane]; the lanes behind the last row are 0.
template <class T, class S>
void load_from(const Array& array, const Piece& at, T* out, int64_t pitch) {
  constexpr int W = WIDTH<T>;
  const S* p = address<const S>(array, at);
  int t = 0;
  if (at.rows == W && array.row == 1) {
    for (; t < at.steps; ++t) write_vector<T>(read_vector<T>(p + t * array.time), out + t * pitch);
  } else if (at.rows == W && array.time == 1) {
    for (; t + W <= at.steps; t += W) {
      Vec<T> square[W];
      for (int i = 0; i < W; ++i) {
        const S* from = p + i * array.row + t;
        square[i] = read_vector<T>(from);
        __builtin_prefetch(from + at.steps);  // rows are far apart: no prefetcher sees the next
      }
      transpose<T>(square);
      for (int j = 0; j < W; ++j) write_vector<T>(square[j], out + (t + j) * pitch);
    }
  }
  for (; t < at.steps; ++t)
    for (int i = 0; i < W; ++i)
      out[t * pitch + i] = i < at.rows ? convert<T>(p[i * array.row + t * array.time]) : T(0);
}

// From vectors `pitch` apart.
template <class T, class S>
void store_to(const Array& array, const Piece& at, const Vec<T>* in, int64_t pitch) {
  constexpr int W = WIDTH<T>;
  S* p = address<S>(array, at);
  int t = 0;
  if (at.rows == W && array.row == 1) {
    for (; t < at.steps; ++t) write_vector<T>(in[t * pitch], p + t * array.time);
  } else if (at.rows == W && array.time == 1) {
    for (; t + W <= at.steps; t += W) {
      Vec<T> square[W];
      for (int j = 0; j < W; ++j) square[j] = in[(t + j) * pitch];
      transpose<T>(square);
      for (int i = 0; i < W; ++i) write_vector<T>(square[i], p + i * array.row + t);
    }
  }
  for (; t < at.steps; ++t)
    for (int i = 0; i < at.rows; ++i) p[i * array.row + t * array.time] = convert<S>(in[t * pitch][i]);
}

template <class T>
void load(const Array& array, const Piece& at, T* out, int64_t pitch) {
  with_dtype(array.dtype, [&](auto, auto x) { load_from<T, decltype(x)>(array, at, out, pitch); });
}

template <class T>
void store(const Array& array, const Piece& at, const Vec<T>* in, int64_t pitch) {
  with_dtype(array.dtype, [&](auto, auto x) { store_to<T, decltype(x)>(array, at, in, pitch); });
}
