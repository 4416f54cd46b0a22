// Products of bf16 matrices, summed in float32 by tiles of 16 x 16: in AMX's registers where the
// compiler may use them, else number by number.
#pragma once

#ifdef __AMX_BF16__
#include <immintrin.h>
#endif

#include <algorithm>
#include <vector>

#include "products.h"

constexpr int TILE = 16;   // rows and columns of a tile of sums
constexpr int DEPTH = 32;  // products that one step adds to each sum

constexpr int64_t tiles_of(int64_t size) { return (size + TILE - 1) / TILE; }
constexpr int64_t steps_of(int64_t depth) { return (depth + DEPTH - 1) / DEPTH; }

// Rows of whole vectors, somewhere in a matrix.
template <class V>
struct Rows {
  V* data;
  int64_t vectors;  // from one row to the next

  V* row(int64_t i) const { return data + i * vectors; }
};
using Source = Rows<const Vec<float>>;
using Target = Rows<Vec<float>>;

// Rows of whole vectors. A vector holds 32 bf16 numbers, or 16 pairs of them, or 16 floats.
class Matrix {
 public:
  Matrix(int64_t rows, int64_t vectors) : vectors_(vectors), data_(rows * vectors) {}

  Vec<float>* row(int64_t i) { return &data_[i * vectors_]; }
  const Vec<float>* row(int64_t i) const { return &data_[i * vectors_]; }
  bf16* numbers(int64_t i) { return reinterpret_cast<bf16*>(row(i)); }
  const bf16* numbers(int64_t i) const { return reinterpret_cast<const bf16*>(row(i)); }
  float* sums(int64_t i) { return reinterpret_cast<float*>(row(i)); }
  const float* sums(int64_t i) const { return reinterpret_cast<const float*>(row(i)); }
  // From a row and a vector on.
  Source from(int64_t row, int64_t vector = 0) const { return {this->row(row) + vector, vectors_}; }
  Target into(int64_t row, int64_t vector = 0) { return {this->row(row) + vector, vectors_}; }
  operator Source() const { return from(0); }
  operator Target() { return into(0); }
  int64_t vectors() const { return vectors_; }
  int64_t rows() const { return static_cast<int64_t>(data_.size()) / vectors_; }
  void clear(int64_t from, int64_t to) {
    std::fill(data_.begin() + from * vectors_, data_.begin() + to * vectors_, Vec<float>{});
  }

 private:
  int64_t vectors_;
  std::vector<Vec<float>> data_;
};

// Two factors: a's rows hold numbers, b's rows hold the pairs of two successive rows. Of the depth
// that they share, the steps from `first` up to `last` are summed.
struct Factors {
  Source a, b;
  int64_t first, last;
};

// Rows of `from` two by two: to (rows / 2, numbers of a row), of pairs.
inline void pair_rows(const Matrix& from, Matrix& to) {
  using Word [[gnu::vector_size(64)]] = uint32_t;
  for (int64_t i = 0; i < from.rows(); i += 2) {
    const Half* upper = reinterpret_cast<const Half*>(from.row(i));
    const Half* lower = reinterpret_cast<const Half*>(from.row(i + 1));
    for (int64_t v = 0; v < 2 * from.vectors(); ++v) {
      const Word first = __builtin_convertvector(upper[v], Word);
      const Word both = first | __builtin_convertvector(lower[v], Word) << 16;
      to.row(i / 2)[v] = reinterpret_cast<Vec<float>>(both);
    }
  }
}

// Two vectors of floats, rounded, as pairs.
inline Vec<float> paired(Vec<float> first, Vec<float> second) {
  using Word [[gnu::vector_size(64)]] = uint32_t;
  const Word low = __builtin_convertvector(narrow(first), Word);
  return reinterpret_cast<Vec<float>>(low | __builtin_convertvector(narrow(second), Word) << 16);
}

// The transpose in words of 32 bits: of rows of numbers it makes pairs of the columns, and of paired
// rows the rows that were the columns before.
inline void turn(const Matrix& from, Matrix& to) {
  turn<float>(from.row(0), from.vectors(), from.rows() / WIDTH<float>, to.row(0));
}

#ifdef __AMX_BF16__
// While one lives, its thread may multiply.
class Multiplier {
 public:
  Multiplier() {
    // Static: GCC knows of the instruction that it reads eight bytes, and leaves the others unwritten.
    static const struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE};
    } shape;
    _tile_loadconfig(&shape);
  }
  ~Multiplier() { _tile_release(); }
  Multiplier(const Multiplier&) = delete;
  Multiplier& operator=(const Multiplier&) = delete;

  // c's R x V tiles from a row and a tile's column on = the sum of all factors, or added to them.
  template <int R, int V, int N>
  void block(const Factors (&all)[N], Target c, int64_t row, int64_t column, bool add) const {
    const int64_t pitch = c.vectors * 64;
    float* upper = reinterpret_cast<float*>(c.row(row) + column);
    float* lower = upper + TILE * c.vectors * 16;
    if (add) {
      _tile_loadd(0, upper, pitch);
      if constexpr (V > 1) _tile_loadd(1, upper + TILE, pitch);
      if constexpr (R > 1) _tile_loadd(2, lower, pitch);
      if constexpr (R > 1 && V > 1) _tile_loadd(3, lower + TILE, pitch);
    } else {
      _tile_zero(0);
      if constexpr (V > 1) _tile_zero(1);
      if constexpr (R > 1) _tile_zero(2);
      if constexpr (R > 1 && V > 1) _tile_zero(3);
    }
    for (const Factors& each : all) {
      const int64_t a_pitch = each.a.vectors * 64, b_pitch = each.b.vectors * 64;
      for (int64_t step = each.first; step < each.last; ++step) {
        const Vec<float>* b = each.b.row(step * TILE) + column;
        _tile_loadd(4, each.a.row(row) + step, a_pitch);
        _tile_loadd(6, b, b_pitch);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (V > 1) {
          _tile_loadd(7, b + 1, b_pitch);
          _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (R > 1) {
          _tile_loadd(5, each.a.row(row + TILE) + step, a_pitch);
          _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (R > 1 && V > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, upper, pitch);
    if constexpr (V > 1) _tile_stored(1, upper + TILE, pitch);
    if constexpr (R > 1) _tile_stored(2, lower, pitch);
    if constexpr (R > 1 && V > 1) _tile_stored(3, lower + TILE, pitch);
  }
};
#else
class Multiplier {
 public:
  template <int R, int V, int N>
  void block(const Factors (&all)[N], Target c, int64_t row, int64_t column, bool add) const {
    for (int64_t i = row; i < row + R * TILE; ++i)
      for (int64_t v = column; v < column + V; ++v) {
        Vec<float> sum = add ? c.row(i)[v] : Vec<float>{};
        for (const Factors& each : all)
          for (int64_t k = each.first * TILE; k < each.last * TILE; ++k) {
            const auto pairs = reinterpret_cast<Simd<float>::I>(each.b.row(k)[v]);
            const Vec<float> first = reinterpret_cast<Vec<float>>(pairs << 16);
            const Vec<float> second = reinterpret_cast<Vec<float>>(pairs & -65536);
            const bf16* a = reinterpret_cast<const bf16*>(each.a.row(i)) + 2 * k;
            sum += convert<float>(a[0]) * first;
            sum += convert<float>(a[1]) * second;
          }
        c.row(i)[v] = sum;
      }
  }
};
#endif

// c's rows of tiles from `row` on and its columns of tiles from `column` on = the sum of the factors,
// whose a's have the same rows; or added to what c holds.
template <int N>
void product(const Multiplier& multiplier, const Factors (&all)[N], Target c, int64_t row,
             int64_t rows, int64_t column, int64_t columns, bool add = false) {
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t j = 0; j < columns; j += 2) {
      const int64_t at = row + i * TILE, to = column + j;
      const bool tall = i + 1 < rows, wide = j + 1 < columns;
      if (tall && wide) multiplier.block<2, 2>(all, c, at, to, add);
      else if (tall) multiplier.block<2, 1>(all, c, at, to, add);
      else if (wide) multiplier.block<1, 2>(all, c, at, to, add);
      else multiplier.block<1, 1>(all, c, at, to, add);
    }
}

// Whether products are AMX's.
extern "C" int64_t in_hardware() {
#ifdef __AMX_BF16__
  return 1;
#else
  return 0;
#endif
}
