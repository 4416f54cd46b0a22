// The softmax between the products of the chunked loss, a row of logits at a time: read once, it
// stays in the cache as exponentials until its gradient is written over it.
#include <limits>
#include <vector>

#include "lanes.h"

// Laid out as in cpp.py. Rows of `width` logits lie one behind another; `losses`, a number for
// each, are in the dtype of sums.
extern "C" struct Problem {
  int64_t rows, width, dtype, gradient, threads;
  double share;
  void* logits;
  const int64_t* targets;  // in [0, width)
  void* losses;
};

namespace {

constexpr int K = 4;  // vectors of a block: their exponentials are computed side by side

template <class T>
using Block = Vec<T>[K];

template <class T, class In>
class Row {
 public:
  explicit Row(const Problem& p) : p_(p), blocks_((p.width + SIZE - 1) / SIZE), x_(blocks_ * K) {}

  // log(sum of exp(row)) - row[target]; the row becomes share (softmax(row) - onehot(target)).
  void soften(int64_t number) {
    In* row = static_cast<In*>(p_.logits) + number * p_.width;
    const int64_t target = p_.targets[number];
    const T most = read(row), total = exponentiate(most, row + p_.width);
    static_cast<T*>(p_.losses)[number] = std::log(total) - (convert<T>(row[target]) - most);
    if (!p_.gradient) return;
    const T share = p_.share, scale = share / total;
    const T* x = numbers();
    for (int64_t i = 0; i < p_.width; ++i) row[i] = convert<In>(x[i] * scale);
    row[target] = convert<In>(x[target] * scale - share);
  }

 private:
  static constexpr int64_t SIZE = K * WIDTH<T>;
  static constexpr T INFINITE = std::numeric_limits<T>::infinity();

  T* numbers() { return reinterpret_cast<T*>(x_.data()); }

  // The largest logit; behind the last one stands -infinity, whose exponential is 0.
  T read(const In* row) {
    T* x = numbers();
    for (int64_t i = 0; i < p_.width; ++i) x[i] = convert<T>(row[i]);
    for (int64_t i = p_.width; i < blocks_ * SIZE; ++i) x[i] = -INFINITE;
    Block<T> most;
    for (Vec<T>& m : most) m = all<Vec<T>>(-INFINITE);
    for (int64_t b = 0; b < blocks_ * K; b += K)
      for (int k = 0; k < K; ++k) most[k] = x_[b + k] > most[k] ? x_[b + k] : most[k];
    for (int k = 1; k < K; ++k) most[0] = most[k] > most[0] ? most[k] : most[0];
    return lane_max<T>(most[0]);
  }

  // The sum of exp(x - most), which takes the place of x. Meanwhile the next row comes into the
  // cache: reading it is what one waits for otherwise.
  T exponentiate(T most, const In* next) {
    Block<T> total{};
    for (int64_t b = 0; b < blocks_ * K; b += K) {
      Block<T> e;
      for (int k = 0; k < K; ++k) e[k] = x_[b + k] - most;
      exp_all<K>(e);
      for (size_t byte = 0; byte < SIZE * sizeof(In); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(next + b * WIDTH<T>) + byte);
      for (int k = 0; k < K; ++k) total[k] += x_[b + k] = e[k];
    }
    for (int k = 1; k < K; ++k) total[0] += total[k];
    return lane_sum<T>(total[0]);
  }

  const Problem& p_;
  const int64_t blocks_;
  std::vector<Vec<T>> x_;  // the row, then its exponentials
};

}  // namespace

extern "C" void softmax_rows(const Problem* p) {
  with_dtype(p->dtype, [&](auto sum, auto in) {
#pragma omp parallel num_threads(p->threads) if (p->threads > 1)
    {
      Row<decltype(sum), decltype(in)> row(*p);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < p->rows; ++i) row.soften(i);
    }
  });
}
