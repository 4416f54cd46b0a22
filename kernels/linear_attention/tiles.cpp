// Linear attention of bf16 tensors by chunks, forward and backward: chunked.py's equations, with the
// names of its letters. Sums are float32; a chunk's squares, the states and the gradients of outputs
// are rounded to bf16 where they are factors.
//
// The gradient of a sum of weights cancels that of what they weigh, which rounding would undo. So the
// outputs' gradient is rounded first, and that of the sum follows from it as two numbers, of which the
// second is what rounding the first has left: two columns of ones stand behind the values.
//
// One head of one sequence is one unit of work, whose state stays in the cache. Rows and columns are
// padded with zeros to whole tiles. In front of a product, the tokens that have no part in it become
// zero in the chunk's copy: first those of other documents than the state's before the chunk, which do
// not read it, then those of other documents than the one that goes on behind the chunk.
#include <algorithm>
#include <limits>

#include "tiles.h"

constexpr int64_t CHUNK = 64;

constexpr float SMALLEST_FEATURE = 1e-12f;  // as in features.py

// Laid out as in tiles.py. Tokens are bf16, but q, k and their gradients are float32 where features
// are made of them; all else is contiguous, and numbers are float32 unless said otherwise. Null is
// what is not given.
extern "C" struct Problem {
  int64_t batch, length, heads, K, V, threads;
  int64_t hedgehog;          // whether q and k, K / 2 wide, are made into their softmax and that of -q, -k
  int64_t normalize;         // whether weights are summed: W = V + 1
  double scale, eps;
  Tokens q, k, v, y;         // without y only the states are made
  const int64_t* documents;  // (batch, length), another number where a document begins
  const bool* padding;       // (batch, length)
  const float* initial;      // (batch, heads, K, W)
  float* last;               // (batch, heads, K, W)
  float* sums;               // (batch, length, heads): of weights and eps, if `normalize`
  bf16* kept;                // states before chunks (batch heads, chunks, K, W in whole vectors)
  Tokens grad_y, dq, dk, dv;  // these are for the backward pass only, which reads y if `normalize`
  const float* grad_last;    // (batch, heads, K, W)
  float* d_initial;          // (batch, heads, K, W)
};

namespace {

class Unit {
 public:
  Unit(const Problem& p, const Multiplier& multiplier)
      : p_(p),
        multiplier_(multiplier),
        W_(p.V + 2 * p.normalize),
        wide_(steps_of(W_)),
        deep_(steps_of(p.K)),
        X_(p.hedgehog ? p.K / 2 : p.K),
        half_(vectors_of<float>(X_)),
        q_(CHUNK, deep_),
        k_(CHUNK, deep_),
        v_(CHUNK, wide_),
        turned_k_(deep_ * TILE, CHUNK / TILE),
        pairs_k_(CHUNK / 2, 2 * deep_),
        across_(deep_ * DEPTH, CHUNK / DEPTH),
        pairs_v_(CHUNK / 2, 2 * wide_),
        squares_(CHUNK, CHUNK / TILE),
        weights_(CHUNK, CHUNK / DEPTH),
        out_(CHUNK, 2 * std::max(wide_, deep_)),
        state_(deep_ * DEPTH, 2 * wide_),
        low_state_(deep_ * DEPTH, wide_),
        pairs_state_(deep_ * TILE, 2 * wide_),
        exact_q_(1, 2 * half_),
        exact_k_(1, 2 * half_),
        room_(2, half_) {}

  void forward(int64_t unit) {
    choose(unit, CHUNK);
    read_state(p_.initial);
    for (int64_t i = 0; p_.normalize && i < p_.K; ++i) state_.sums(i)[p_.V + 1] = state_.sums(i)[p_.V];
    for (int64_t start = 0; start < p_.length; start += CHUNK) {
      read_keys(start);
      if (p_.kept || p_.y.data) lower_state();
      if (p_.kept) std::copy_n(low_state_.numbers(0), p_.K * wide_ * DEPTH, kept());
      if (p_.y.data) outputs();
      leave_last_document(v_);
      if (last_ || !p_.y.data) pair_rows(v_, pairs_v_);
      pair_rows(k_, pairs_k_);
      turn(pairs_k_, across_);
      add_to_state(pairs_v_);
    }
    write_state(p_.last);
  }

  // `forward` has kept the states.
  void backward(int64_t unit) {
    choose(unit, -CHUNK);
    read_state(p_.grad_last);
    Matrix g(CHUNK, wide_), pairs_g(CHUNK / 2, 2 * wide_), turned_g(wide_ * TILE, CHUNK / TILE);
    Matrix turned_q(deep_ * TILE, CHUNK / TILE), pairs_q(CHUNK / 2, 2 * deep_);
    Matrix turned_v(wide_ * TILE, CHUNK / TILE);
    if (p_.hedgehog) exact_q_ = exact_k_ = Matrix(CHUNK, 2 * half_);
    Matrix before(deep_ * DEPTH, wide_), turned_state(wide_ * TILE, 2 * deep_);
    for (int64_t start = (p_.length - 1) / CHUNK * CHUNK; start >= 0; start -= CHUNK) {
      read_keys(start);
      read_features(p_.q, q_, exact_q_);
      read_gradient(g);
      turn(q_, turned_q);
      turn(v_, turned_v);
      turn(g, turned_g);
      pair_rows(q_, pairs_q);
      pair_rows(k_, pairs_k_);
      pair_rows(g, pairs_g);

      // dV = A^T G + K R, with A^T = K Q^T; R is the gradient of the state after the chunk.
      lower_state();
      upper_squares(k_, turned_q, deep_);
      leave_last_document(k_);
      for (int64_t i = 0; i < pairs_; ++i)
        product(multiplier_, {{weights_, pairs_g, i, pairs_}, {k_, pairs_state_, 0, deep_}}, out_,
                i * DEPTH, 2, 0, tiles_of(W_));
      for (int64_t i = 0; i < size_; ++i) {
        if (padding(i)) std::fill_n(out_.sums(i), p_.V, 0.f);
        store(out_, i, p_.dv, p_.V);
      }

      // dK = dA^T Q + V R^T, with dA^T = V G^T.
      upper_squares(v_, turned_g, wide_);
      leave_last_document(v_);
      turn(low_state_, turned_state);
      for (int64_t i = 0; i < pairs_; ++i)
        product(multiplier_, {{weights_, pairs_q, i, pairs_}, {v_, turned_state, 0, wide_}}, out_,
                i * DEPTH, 2, 0, tiles_of(p_.K));
      store_features(p_.dk, exact_k_);

      // dQ = dA K + G E^T, with dA = G V^T.
      lower_squares(g, turned_v, wide_);
      leave_first_document(g);
      std::copy_n(kept(), p_.K * wide_ * DEPTH, before.numbers(0));
      turn(before, turned_state);
      for (int64_t i = 0; i < pairs_; ++i)
        product(multiplier_, {{weights_, pairs_k_, 0, i + 1}, {g, turned_state, 0, wide_}}, out_,
                i * DEPTH, 2, 0, tiles_of(p_.K));
      store_features(p_.dq, exact_q_);

      // R <- R + Q^T G.
      if (first_ < size_) pair_rows(g, pairs_g);
      turn(pairs_q, across_);
      add_to_state(pairs_g);
    }
    for (int64_t i = 0; p_.normalize && i < p_.K; ++i) state_.sums(i)[p_.V] += state_.sums(i)[p_.V + 1];
    write_state(p_.d_initial);
  }

 private:
  void choose(int64_t unit, int64_t ahead) {
    unit_ = unit;
    ahead_ = ahead;
    b_ = unit / p_.heads;
    h_ = unit % p_.heads;
  }

  int64_t token(int64_t i) const { return b_ * p_.length + start_ + i; }
  bool begins(int64_t i) const {
    return p_.documents && start_ + i && p_.documents[token(i)] != p_.documents[token(i) - 1];
  }
  bool padding(int64_t i) const { return p_.padding && p_.padding[token(i)]; }
  template <class T = bf16>
  T* address(const Tokens& x, int64_t i, int64_t width) const {
    return static_cast<T*>(x.data) + b_ * x.batch + (start_ + i) * x.time + h_ * width;
  }
  bf16* kept() const {
    const int64_t chunks = (p_.length + CHUNK - 1) / CHUNK;
    return p_.kept + (unit_ * chunks + start_ / CHUNK) * p_.K * wide_ * DEPTH;
  }

  void read(const Tokens& x, int64_t width, Matrix& to) const {
    for (int64_t i = 0; i < size_; ++i) {
      const bf16* row = address(x, i, width);
      std::copy_n(row, width, to.numbers(i));
      fetch<0>(x, i, width);
    }
    to.clear(size_, CHUNK);
  }
  void store(const Matrix& from, int64_t i, const Tokens& to, int64_t width, float scale = 1) const {
    store_row<float>(from.row(i), width, address(to, i, width), scale);
    fetch<1>(to, i, width);
  }
  // Let row i of the next chunk come into the cache, to be read or to be written.
  template <int WRITE, class T = bf16>
  void fetch(const Tokens& x, int64_t i, int64_t width) const {
    const T* row = address<T>(x, i + ahead_, width);
    for (int64_t j = 0; j < width; j += 64 / sizeof(T)) __builtin_prefetch(row + j, WRITE, 2);
  }

  // Queries or keys as they are, or their features, which also stand in `exact`, half by half, as far
  // as it has rows.
  void read_features(const Tokens& x, Matrix& to, Matrix& exact) {
    if (!p_.hedgehog) return read(x, p_.K, to);
    for (int64_t i = 0; i < size_; ++i) {
      const float* row = address<float>(x, i, X_);
      fetch<0, float>(x, i, X_);
      Vec<float>* halves = exact.row(i % exact.rows());
      for (const int sign : {1, -1}) {
        Vec<float>* half = halves + (sign < 0) * half_;
        load_row<float>(row, X_, half, float(sign));
        softmax(half);
        store_row<float>(half, X_, to.numbers(i) + (sign < 0) * X_);
      }
    }
    to.clear(size_, CHUNK);
  }
  void softmax(Vec<float>* x) const {
    float* numbers = reinterpret_cast<float*>(x);
    std::fill(numbers + X_, numbers + half_ * TILE, -std::numeric_limits<float>::infinity());
    Vec<float> top = x[0], sum{};
    for (int64_t j = 1; j < half_; ++j) top = x[j] > top ? x[j] : top;
    const float most = lane_max<float>(top);
    for (int64_t j = 0; j < half_; ++j) sum += x[j] = exp(x[j] - most);
    const float share = 1 / lane_sum<float>(sum);
    for (int64_t j = 0; j < half_; ++j) {
      x[j] *= share;
      x[j] = x[j] < SMALLEST_FEATURE ? all<Vec<float>>(SMALLEST_FEATURE) : x[j];
    }
  }

  // From the gradients of features, in out_, to those of what they are made of.
  void store_features(const Tokens& to, const Matrix& exact) {
    for (int64_t i = 0; i < size_; ++i) {
      if (!p_.hedgehog) {
        store(out_, i, to, p_.K);
        continue;
      }
      Vec<float>*grad = room_.row(0), *sum = room_.row(1);
      std::fill_n(sum, half_, Vec<float>{});
      for (const int sign : {1, -1}) {
        const Vec<float>* feature = exact.row(i) + (sign < 0) * half_;
        load_row<float>(out_.sums(i) + (sign < 0) * X_, X_, grad);
        for (int64_t j = 0; j < half_; ++j)
          grad[j] = feature[j] > SMALLEST_FEATURE ? grad[j] : Vec<float>{};
        const float mean = inner_product<float>(feature, grad, half_);
        for (int64_t j = 0; j < half_; ++j) sum[j] += feature[j] * (grad[j] - mean) * float(sign);
      }
      store_row<float>(sum, X_, address<float>(to, i, X_));
      fetch<1, float>(to, i, X_);
    }
  }

  // The chunk's keys and values, and which of its tokens are of one document.
  void read_keys(int64_t start) {
    start_ = start;
    size_ = std::min(CHUNK, p_.length - start);
    pairs_ = steps_of(size_);
    read_features(p_.k, k_, exact_k_);
    read(p_.v, p_.V, v_);
    for (int64_t i = 0; i < size_; ++i) {
      for (int64_t j = p_.V; j < W_; ++j) v_.numbers(i)[j] = convert<bf16>(1.f);
      if (padding(i)) v_.clear(i, i + 1);
    }
    first_ = size_;
    last_ = 0;
    for (int64_t i = 0; i < size_; ++i) {
      if (begins(i)) {
        first_ = std::min(first_, i);
        std::fill(end_ + last_, end_ + i, i);
        last_ = i;
      }
      begin_[i] = last_;
    }
    std::fill(end_ + last_, end_ + size_, size_);
  }

  // Zero where the state before the chunk is not read, and where that behind it is not made.
  void leave_first_document(Matrix& x) const { x.clear(first_, size_); }
  void leave_last_document(Matrix& x) const { x.clear(0, last_); }

  void read_state(const float* from) {
    const int64_t W = p_.V + p_.normalize;
    state_.clear(0, state_.rows());
    for (int64_t i = 0; from && i < p_.K; ++i)
      std::copy_n(from + (unit_ * p_.K + i) * W, W, state_.sums(i));
  }
  void write_state(float* to) const {
    const int64_t W = p_.V + p_.normalize;
    for (int64_t i = 0; to && i < p_.K; ++i)
      std::copy_n(state_.sums(i), W, to + (unit_ * p_.K + i) * W);
  }
  void lower_state() {
    for (int64_t i = 0; i < p_.K; ++i)
      store_row<float>(state_.row(i), W_, low_state_.numbers(i));
    pair_rows(low_state_, pairs_state_);
  }
  // State += across_ x; a document that begins in the chunk has nothing of the state.
  void add_to_state(const Matrix& x) {
    product(multiplier_, {{across_, x, 0, pairs_}}, state_, 0, tiles_of(p_.K), 0, tiles_of(W_),
            first_ == size_);
  }

  // weights_ = the rows of a times the turned ones, of query i and key j <= i in its document; rows
  // behind the last token may be anything.
  void lower_squares(const Matrix& a, const Matrix& turned, int64_t depth) {
    for (int64_t i = 0; i < pairs_; ++i)
      product(multiplier_, {{a, turned, 0, depth}}, squares_, i * DEPTH, 2, 0, 2 * (i + 1));
    for (int64_t i = 0; i < size_; ++i) keep(i, begin_[i], i + 1, 0, i / DEPTH + 1);
  }
  // The transpose of those: of key i and query j >= i in its document.
  void upper_squares(const Matrix& a, const Matrix& turned, int64_t depth) {
    for (int64_t i = 0; i < pairs_; ++i)
      product(multiplier_, {{a, turned, 0, depth}}, squares_, i * DEPTH, 2, 2 * i, 2 * (pairs_ - i));
    for (int64_t i = 0; i < size_; ++i) keep(i, i, end_[i], i / DEPTH, pairs_);
  }
  // Row i of the squares, from pair `first` of tiles up to pair `last`: what is there from `low` up to
  // `high`, and zero elsewhere, whatever stood there.
  void keep(int64_t i, int64_t low, int64_t high, int64_t first, int64_t last) {
    const Vec<float>* row = squares_.row(i);
    Whole* to = reinterpret_cast<Whole*>(weights_.row(i));
    for (int64_t pair = first; pair < last; ++pair) {
      Vec<float> left = row[2 * pair], right = row[2 * pair + 1];
      const int64_t from = low - pair * DEPTH, behind = high - pair * DEPTH;
      if (from > 0 || behind < DEPTH) {
        left = within(left, from, behind);
        right = within(right, from - TILE, behind - TILE);
      }
      to[pair] = narrow(left, right);
    }
  }

  // The numbers of x from place `low` up to `high`, and zeros.
  static Vec<float> within(Vec<float> x, int64_t low, int64_t high) {
    using I = Simd<float>::I;
    const I at = counting_from<float>(0);
    return ((at >= all<I>(low)) & (at < all<I>(high))) ? x : Vec<float>{};
  }

  // Y = A V + Q E, with A = Q K^T, then scaled, and divided by the sum of weights.
  void outputs() {
    read_features(p_.q, q_, exact_q_);
    turn(k_, turned_k_);
    pair_rows(v_, pairs_v_);
    lower_squares(q_, turned_k_, deep_);
    leave_first_document(q_);
    for (int64_t i = 0; i < pairs_; ++i)
      product(multiplier_, {{weights_, pairs_v_, 0, i + 1}, {q_, pairs_state_, 0, deep_}}, out_,
              i * DEPTH, 2, 0, tiles_of(W_));
    for (int64_t i = 0; i < size_; ++i) {
      float scale = p_.scale;
      if (p_.normalize) {
        const float sum = p_.sums[token(i) * p_.heads + h_] = out_.sums(i)[p_.V] * scale + float(p_.eps);
        scale /= sum;
      }
      store(out_, i, p_.y, p_.V, scale);
    }
  }

  // The gradient of the outputs before they were scaled, and that of their sum of weights behind it.
  void read_gradient(Matrix& g) {
    const int64_t vectors = vectors_of<float>(p_.V);
    Vec<float>*row = out_.row(0), *y = out_.row(1);
    for (int64_t i = 0; i < size_; ++i) {
      const float sum = p_.normalize ? p_.sums[token(i) * p_.heads + h_] : 1;
      load_row<float>(address(p_.grad_y, i, p_.V), p_.V, row, float(p_.scale) / sum);
      fetch<0>(p_.grad_y, i, p_.V);
      store_row<float>(row, p_.V, g.numbers(i));
      if (!p_.normalize) continue;
      load_row<float>(address(p_.y, i, p_.V), p_.V, y);
      fetch<0>(p_.y, i, p_.V);
      load_row<float>(g.numbers(i), p_.V, row);
      const float of_sum = -inner_product<float>(row, y, vectors);
      const bf16 first = convert<bf16>(of_sum);
      g.numbers(i)[p_.V] = first;
      g.numbers(i)[p_.V + 1] = convert<bf16>(of_sum - convert<float>(first));
    }
  }

  const Problem& p_;
  const Multiplier& multiplier_;
  int64_t W_;                        // width of values and ones
  int64_t wide_, deep_;              // of these and of keys: steps of depth, vectors of numbers
  int64_t X_, half_;                 // width of what features are made of, and its vectors of floats
  Matrix q_, k_, v_, turned_k_, pairs_k_, across_, pairs_v_, squares_, weights_, out_;
  Matrix state_, low_state_, pairs_state_;
  Matrix exact_q_, exact_k_, room_;
  int64_t unit_ = 0, b_ = 0, h_ = 0;
  int64_t ahead_ = CHUNK;  // from one chunk to the next, whose numbers are fetched meanwhile
  int64_t start_ = 0, size_ = 0, pairs_ = 0;  // of the chunk; pairs of tiles
  int64_t first_ = 0, last_ = 0;              // where its first and its last new document begins
  int64_t begin_[CHUNK] = {}, end_[CHUNK] = {};  // of every token's document within the chunk
};

template <class Work>
void all_units(const Problem& p, Work work) {
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    const Multiplier multiplier;
    Unit unit(p, multiplier);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < p.batch * p.heads; ++i) work(unit, i);
  }
}

}  // namespace

extern "C" void forward(const Problem* p) {
  all_units(*p, [](Unit& unit, int64_t i) { unit.forward(i); });
}

extern "C" void backward(const Problem* p) {
  all_units(*p, [](Unit& unit, int64_t i) { unit.backward(i); });
}
