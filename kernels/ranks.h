// The largest of some numbers, the earlier ones of equals: by halving the range of what could be the
// least of them, over all numbers at once, which needs no order among them.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "lanes.h"

template <class T>
using Rank = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// x as an integer in the order of numbers; 0 and -0 are equal, NaN is above all.
template <class T>
inline Rank<T> rank_of(T x) {
  constexpr Rank<T> MOST = std::numeric_limits<Rank<T>>::max();
  if (x != x) return MOST;
  x += 0;
  Rank<T> bits;
  std::memcpy(&bits, &x, sizeof(T));
  return bits ^ (bits >> (8 * sizeof(T) - 1) & MOST);
}

// Some numbers' ranks, in whole vectors: what is behind the last is below all.
template <class T>
class Ranks {
 public:
  void assign(int64_t size) {
    size_ = size;
    vectors_.assign((size + WIDTH<T> - 1) / WIDTH<T>, lowest());
  }
  Rank<T>& operator[](int64_t i) { return reinterpret_cast<Rank<T>*>(vectors_.data())[i]; }

  // How many are at least `least`, above the lowest of all integers.
  int64_t at_least(Rank<T> least) const {
    const I bound = I{} + least;
    I a{}, b{};
    size_t i = 0;
    for (; i + 2 <= vectors_.size(); i += 2) {
      a -= vectors_[i] >= bound;
      b -= vectors_[i + 1] >= bound;
    }
    if (i < vectors_.size()) a -= vectors_[i] >= bound;
    a += b;
    int64_t sum = 0;
    for (int lane = 0; lane < WIDTH<T>; ++lane) sum += a[lane];
    return sum;
  }

  // Calls take(i) for the `count` largest, 0 <= count <= size, in the order in which they stand.
  template <class F>
  void largest(int64_t count, F take) {
    if (count <= 0) return;
    if (count >= size_) {
      for (int64_t i = 0; i < size_; ++i) take(i);
      return;
    }
    const Rank<T> least = least_of(count);
    constexpr Rank<T> MOST = std::numeric_limits<Rank<T>>::max();
    int64_t room = count - (least < MOST ? at_least(least + 1) : 0);  // among those equal to least
    for (int64_t i = 0; i < size_; ++i) {
      const Rank<T> x = (*this)[i];
      if (x > least || (x == least && room-- > 0)) take(i);
    }
  }

 private:
  using I = typename Simd<T>::I;
  static I lowest() { return I{} + std::numeric_limits<Rank<T>>::min(); }

  // The largest number that at least `count` reach, or any that exactly `count` do.
  Rank<T> least_of(int64_t count) {
    Rank<T> low = (*this)[0], high = low;
    for (int64_t i = 1; i < size_; ++i) {
      low = std::min(low, (*this)[i]);
      high = std::max(high, (*this)[i]);
    }
    using U = std::make_unsigned_t<Rank<T>>;
    while (low < high) {
      const U gap = static_cast<U>(high) - static_cast<U>(low);
      const Rank<T> middle = static_cast<Rank<T>>(static_cast<U>(low) + gap / 2 + gap % 2);
      const int64_t reached = at_least(middle);
      if (reached >= count) low = middle;
      else high = middle - 1;
      if (reached == count) break;
    }
    return low;
  }

  int64_t size_ = 0;
  std::vector<I> vectors_;
};
