// Estimated sparse attention: the choice of cells (select.py) and softmax attention over the tokens
// that they cover, forward and backward (sparse.py's equations).
//
// A query and head walks over its cells, whose tokens stand side by side: every row of keys and
// values is read once where it lies, and no list of them is made. The backward pass takes a row and
// key head at a time, so that the gradients of its keys are summed in one order, whatever the number
// of threads.
#include <algorithm>
#include <limits>
#include <vector>

#include "products.h"
#include "ranks.h"

// Laid out as in cpp.py. q, y (batch, queries, heads, .), k, v (batch, keys, kv_heads, .) are of one
// dtype; probs is float or double; log_sum (batch, queries, heads) and the gradients of k and v are
// in the dtype of sums.
extern "C" struct Problem {
  int64_t batch, queries, keys, heads, kv_heads, width, value_width, cells, group_heads;
  int64_t dtype, probs_dtype, threads;
  double scale;
  const void *q, *k, *v, *probs;     // probs (batch, heads, queries, cells)
  const int64_t *lengths, *first;    // (batch, queries): tokens seen, and those before the first
  const int64_t *slots;              // (batch, keys): where tokens stand; null: in order
  const int64_t *budget;             // (batch, queries): cells of each group of group_heads heads
  bool* chosen;                      // (batch, heads, queries, cells)
  void *y, *log_sum;
  const void* grad_y;                // these are for the backward pass only
  void *dq, *dk, *dv;
};

namespace {

template <class T>
void choose(const Problem& p) {
  const int64_t groups = p.heads / p.group_heads, K = p.cells;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    Ranks<T> ranks;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.batch * p.queries * groups; ++i) {
      const int64_t group = i % groups, t = i / groups % p.queries, b = i / groups / p.queries;
      const auto at = [&](int64_t h) {  // of the cells of one of the group's heads
        return ((b * p.heads + group * p.group_heads + h) * p.queries + t) * K;
      };
      ranks.assign(p.group_heads * K);
      for (int64_t h = 0; h < p.group_heads; ++h) {
        const T* probs = static_cast<const T*>(p.probs) + at(h);
        for (int64_t c = 0; c < K; ++c) ranks[h * K + c] = rank_of(probs[c]);
        std::fill_n(p.chosen + at(h), K, false);
      }
      ranks.largest(p.budget[b * p.queries + t],
                    [&](int64_t j) { p.chosen[at(j / K) + j % K] = true; });
    }
  }
}

template <class T, class In>
class Attention {
 public:
  explicit Attention(const Problem& p)
      : p_(p),
        K_(vectors_of<T>(p.width)),
        V_(vectors_of<T>(p.value_width)),
        q_(K_),
        out_(V_),
        g_(V_),
        dq_(K_),
        key_(K_),
        value_(V_) {}

  void forward(int64_t b, int64_t t, int64_t h) {
    const int64_t row = start(b, t, h), group = h / (p_.heads / p_.kv_heads);
    T most = -std::numeric_limits<T>::infinity(), total = 0;
    std::fill(out_.begin(), out_.end(), Vec<T>{});
    for (int64_t n = 0; n < seen_; n += WIDTH<T>) {
      const int64_t there = std::min<int64_t>(WIDTH<T>, seen_ - n);
      Vec<T> products[WIDTH<T>]{};
      for (int64_t i = 0; i < there; ++i) {
        const Vec<T>* k = read(p_.k, key_row(b, tokens_[n + i], group), p_.width, key_);
        for (int64_t j = 0; j < K_; ++j) products[i] += q_[j] * k[j];
      }
      Vec<T> weights = lane_sums<T>(products);
      for (int64_t i = there; i < WIDTH<T>; ++i) weights[i] = -std::numeric_limits<T>::infinity();
      const T higher = std::max(most, lane_max<T>(weights));
      if (higher > most) {
        const T shrink = std::exp(most - higher);
        total *= shrink;
        for (int64_t j = 0; j < V_; ++j) out_[j] *= shrink;
        most = higher;
      }
      weights = exp(weights - most);
      total += lane_sum<T>(weights);
      for (int64_t i = 0; i < there; ++i) {
        const Vec<T>* v = read(p_.v, key_row(b, tokens_[n + i], group), p_.value_width, value_);
        for (int64_t j = 0; j < V_; ++j) out_[j] += weights[i] * v[j];
      }
    }
    const T none = seen_ == 0;
    store_row<T>(out_.data(), p_.value_width, static_cast<In*>(p_.y) + row * p_.value_width,
                 1 / (total + none));
    static_cast<T*>(p_.log_sum)[row] = none ? 0 : most + std::log(total);
  }

  void backward(int64_t b, int64_t t, int64_t h) {
    const int64_t row = start(b, t, h), group = h / (p_.heads / p_.kv_heads);
    load_row<T>(static_cast<const In*>(p_.y) + row * p_.value_width, p_.value_width, out_.data());
    load_row<T>(static_cast<const In*>(p_.grad_y) + row * p_.value_width, p_.value_width, g_.data());
    const T mean = inner_product<T>(g_.data(), out_.data(), V_);
    const T sum = static_cast<const T*>(p_.log_sum)[row];
    std::fill(dq_.begin(), dq_.end(), Vec<T>{});
    for (int64_t n = 0; n < seen_; n += WIDTH<T>) {
      const int64_t there = std::min<int64_t>(WIDTH<T>, seen_ - n);
      Vec<T> products[WIDTH<T>]{}, slopes[WIDTH<T>]{};
      for (int64_t i = 0; i < there; ++i) {
        const int64_t at = key_row(b, tokens_[n + i], group);
        const Vec<T>* k = read(p_.k, at, p_.width, key_);
        const Vec<T>* v = read(p_.v, at, p_.value_width, value_);
        for (int64_t j = 0; j < K_; ++j) products[i] += q_[j] * k[j];
        for (int64_t j = 0; j < V_; ++j) slopes[i] += g_[j] * v[j];
      }
      const Vec<T> weights = exp(lane_sums<T>(products) - sum);
      const Vec<T> slope = weights * (lane_sums<T>(slopes) - mean);
      for (int64_t i = 0; i < there; ++i) {
        const int64_t at = key_row(b, tokens_[n + i], group);
        const Vec<T>* k = read(p_.k, at, p_.width, key_);
        for (int64_t j = 0; j < K_; ++j) dq_[j] += slope[i] * k[j];
        add(p_.dk, at, p_.width, slope[i], q_);
        add(p_.dv, at, p_.value_width, weights[i], g_);
      }
    }
    store_row<T>(dq_.data(), p_.width, static_cast<In*>(p_.dq) + row * p_.width, T(p_.scale));
  }

 private:
  using Row = std::vector<Vec<T>>;

  // Reads the query and lists the tokens that its cells cover; its number among all queries.
  int64_t start(int64_t b, int64_t t, int64_t h) {
    const int64_t K = p_.cells, at = b * p_.queries + t, row = at * p_.heads + h;
    const int64_t length = p_.lengths[at], first = p_.first[at];
    const bool* chosen = p_.chosen + ((b * p_.heads + h) * p_.queries + t) * K;
    tokens_.resize(length);
    seen_ = 0;
    for (int64_t c = 0; c < K; ++c) {
      if (!chosen[c]) continue;
      const int64_t end = (2 * (c + 1) * length + K) / (2 * K);
      for (int64_t s = (2 * c * length + K) / (2 * K); s < end; ++s) tokens_[seen_++] = first + s;
    }
    load_row<T>(static_cast<const In*>(p_.q) + row * p_.width, p_.width, q_.data(), T(p_.scale));
    return row;
  }

  int64_t key_row(int64_t b, int64_t token, int64_t group) const {
    const int64_t slot = p_.slots ? p_.slots[b * p_.keys + token] : token;
    return (b * p_.keys + slot) * p_.kv_heads + group;
  }

  // A row of keys or values: where it lies, if that is as vectors of T lie, else a copy in `room`.
  const Vec<T>* read(const void* x, int64_t row, int64_t width, Row& room) const {
    const In* from = static_cast<const In*>(x) + row * width;
    if constexpr (std::is_same_v<T, In>)
      if (width % WIDTH<T> == 0 && reinterpret_cast<uintptr_t>(from) % 64 == 0)
        return reinterpret_cast<const Vec<T>*>(from);
    load_row<T>(from, width, room.data());
    return room.data();
  }

  static void add(void* to, int64_t row, int64_t width, T factor, const Row& x) {
    T* sums = static_cast<T*>(to) + row * width;
    const T* from = reinterpret_cast<const T*>(x.data());
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) sums[i] += factor * from[i];
  }

  const Problem& p_;
  const int64_t K_, V_;  // vectors of a key and of a value
  int64_t seen_ = 0;
  std::vector<int64_t> tokens_;
  Row q_, out_, g_, dq_, key_, value_;
};

template <class T, class In>
void forward(const Problem& p) {
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    Attention<T, In> attention(p);
#pragma omp for schedule(dynamic, 16)
    for (int64_t i = 0; i < p.batch * p.queries; ++i)
      for (int64_t h = 0; h < p.heads; ++h) attention.forward(i / p.queries, i % p.queries, h);
  }
}

template <class T, class In>
void backward(const Problem& p) {
  const int64_t readers = p.heads / p.kv_heads;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    Attention<T, In> attention(p);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < p.batch * p.kv_heads; ++i)
      for (int64_t t = 0; t < p.queries; ++t)
        for (int64_t r = 0; r < readers; ++r)
          attention.backward(i / p.kv_heads, t, i % p.kv_heads * readers + r);
  }
}

}  // namespace

extern "C" {
void choose_cells(const Problem* p) {
  p->probs_dtype == FLOAT64 ? choose<double>(*p) : choose<float>(*p);
}
void attend(const Problem* p) {
  with_dtype(p->dtype, [&](auto sum, auto x) { forward<decltype(sum), decltype(x)>(*p); });
}
void differentiate(const Problem* p) {
  with_dtype(p->dtype, [&](auto sum, auto x) { backward<decltype(sum), decltype(x)>(*p); });
}
}
