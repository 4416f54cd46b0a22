// SSD by chunks, forward and backward: chunked.py's equations, with the names of its letters. Linear
// attention is SSD without decay, with the queries as C, the keys as B and the values as x; a column
// of ones behind the values then sums the weights.
//
// A block of a group's heads goes through the chunks of one sequence: its states stay in the cache,
// the products of B and C are made once for all of its heads, and the gradients of B and C are summed
// over them. Blocks follow from the shapes alone, so that sums have one order whatever the number of
// threads. Decays are sums of the steps between and of no others; a new document decays by nothing
// less than infinity, which cuts every sum across it.
#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "products.h"

// Laid out as in cpp.py. x, z, B, C, their gradients and y are of one dtype, all else is contiguous
// and in the dtype of sums. Null is what is not given.
extern "C" struct Problem {
  int64_t batch, length, heads, groups, width, states, chunk, block, dtype, threads;
  int64_t normalize;             // whether there is a column of ones; states are then wider by one
  int64_t state_down, state_along;  // steps in a head's state from width to width, state to state
  double scale, eps;             // of C; added to the sums of weights
  Tokens x, z, B, C, y;          // without y only the states are made
  const void *dt, *log_decay;    // (batch, length, heads); without them 1 and 0
  const void *D, *initial;       // (heads, width), states of (batch, heads)
  const int64_t* documents;      // (batch, length), growing by 1 or more where a document begins
  void *last, *kept;             // states of (batch, heads), (batch, chunks, groups, states, -1)
  void* sums;                    // (batch, length, heads): of weights and eps, if `normalize`
  Tokens grad_y, dx, dz;         // these are for the backward pass only; y is read if `normalize`
  const void* grad_last;
  void *d_dt, *d_log_decay, *d_initial;  // d_dt and d_log_decay are both wanted, or neither
  void *parts_D;                 // (batch, heads, width), or null
  void *parts_B, *parts_C;       // (blocks of a group, batch, length, groups, states)
};

namespace {

template <class T, class In>
class Block {
 public:
  explicit Block(const Problem& p)
      : p_(p),
        Q_(std::min(p.chunk, p.length)),
        Qv_(vectors_of<T>(Q_)),
        P_(p.width + p.normalize),
        Pv_(vectors_of<T>(P_)),
        Nv_(vectors_of<T>(p.states)),
        R_(p.heads / p.groups),
        blocks_((R_ + p.block - 1) / p.block),
        B_(Qv_ * W * Nv_),
        C_(Q_ * Nv_),
        turned_(Nv_ * W * Qv_),
        squares_(Q_ * Qv_),
        decay_(Q_ * Qv_),
        weights_(Q_ * Qv_),
        x_(Q_ * Pv_),
        written_(Qv_ * W * Pv_),
        leave_(Q_ * Pv_),
        y_(Q_ * Pv_),
        skip_(Pv_),
        room_(Pv_),
        sums_(Qv_),
        arriving_(Qv_),
        dt_(Q_),
        step_(Q_),
        state_(p.block * Nv_ * W * Pv_) {}

  // How many units of work there are.
  int64_t units() const { return p_.batch * p_.groups * blocks_; }

  void forward(int64_t unit) {
    choose(unit);
    for (int64_t r = 0; r < heads_; ++r) read_states(p_.initial, r);
    for (int64_t start = 0; start < p_.length; start += Q_) {
      read_chunk(start, p_.y.data);
      for (int64_t r = 0; r < heads_; ++r) {
        Vec<T>* H = state(r);
        if (p_.kept) kept<false>(r, H);
        read_head(r);
        if (p_.y.data) outputs(H);
        for (int64_t i = 0; p_.y.data && i < size_; ++i) finish_output(r, i);
        decay_states(H);
        product<T, true>(numbers(B_), 1, Nv_ * W, leave_.data(), Pv_, H, Pv_, p_.states, Pv_, size_);
      }
    }
    for (int64_t r = 0; r < heads_; ++r) write_states(p_.last, r);
  }

  void backward(int64_t unit) {
    choose(unit);
    for (Matrix* each : {&g_, &arrived_, &into_}) each->resize(Q_ * Pv_);
    for (Matrix* each : {&dB_, &dC_, &part_}) each->resize(Q_ * Nv_);
    for (Matrix* each : {&slopes_, &d_squares_}) each->resize(Q_ * Qv_);
    before_.resize(Nv_ * W * Pv_);
    turned_state_.resize(Pv_ * W * Nv_);
    turned_x_.resize(Pv_ * W * Qv_);
    dD_.assign(heads_ * Pv_, Vec<T>{});
    for (int64_t r = 0; r < heads_; ++r) read_states(p_.grad_last, r);
    for (int64_t start = (p_.length - 1) / Q_ * Q_; start >= 0; start -= Q_) {
      read_chunk(start, true);
      for (Matrix* each : {&dB_, &dC_, &d_squares_}) std::fill(each->begin(), each->end(), Vec<T>{});
      for (int64_t r = 0; r < heads_; ++r) head_backward(r);
      for (int64_t i = 0; i < size_; i += ROWS) {
        const int64_t rows = std::min<int64_t>(ROWS, size_ - i);
        product<T, true>(numbers(d_squares_) + i * Qv_ * W, Qv_ * W, 1, B_.data(), Nv_, &dC_[i * Nv_],
                         Nv_, rows, Nv_, i + rows);
        product<T, true>(numbers(d_squares_) + i * Qv_ * W + i, 1, Qv_ * W, &C_[i * Nv_], Nv_,
                         &dB_[i * Nv_], Nv_, rows, Nv_, size_ - i);
      }
      for (int64_t i = 0; i < size_; ++i) {
        const int64_t token = ((number_ * p_.batch + b_) * p_.length + start_ + i) * p_.groups + group_;
        store_row<T>(&dB_[i * Nv_], p_.states, static_cast<T*>(p_.parts_B) + token * p_.states);
        store_row<T>(&dC_[i * Nv_], p_.states, static_cast<T*>(p_.parts_C) + token * p_.states,
                     T(p_.scale));
      }
    }
    for (int64_t r = 0; r < heads_; ++r) {
      write_states(p_.d_initial, r);
      const int64_t at = (b_ * p_.heads + head(r)) * p_.width;
      if (p_.parts_D) store_row<T>(&dD_[r * Pv_], p_.width, static_cast<T*>(p_.parts_D) + at);
    }
  }

 private:
  static constexpr int W = WIDTH<T>;
  using Matrix = std::vector<Vec<T>>;

  static const T* numbers(const Matrix& x) { return reinterpret_cast<const T*>(x.data()); }
  static T* numbers(Matrix& x) { return reinterpret_cast<T*>(x.data()); }
  Vec<T>* state(int64_t r) { return &state_[r * Nv_ * W * Pv_]; }
  int64_t head(int64_t r) const { return group_ * R_ + number_ * p_.block + r; }

  void choose(int64_t unit) {
    number_ = unit % blocks_;
    group_ = unit / blocks_ % p_.groups;
    b_ = unit / blocks_ / p_.groups;
    heads_ = std::min(p_.block, R_ - number_ * p_.block);
    std::fill(state_.begin(), state_.end(), Vec<T>{});
  }

  // Step i of the chunk, of a head or a group.
  In* address(const Tokens& x, int64_t i, int64_t which, int64_t width) const {
    return static_cast<In*>(x.data) + b_ * x.batch + (start_ + i) * x.time + which * width;
  }
  void load(const Tokens& x, int64_t i, int64_t r, Vec<T>* to) const {
    to[Pv_ - 1] = Vec<T>{};  // which may hold the column of ones alone
    load_row<T>(address(x, i, head(r), p_.width), p_.width, to);
  }
  void store(const Tokens& x, int64_t i, int64_t r, const Vec<T>* from) const {
    store_row<T>(from, p_.width, address(x, i, head(r), p_.width));
  }

  // A head's state, which stands here as (states, width); zero if there is none.
  void read_states(const void* from, int64_t r) {
    if (!from) return;
    const T* x = static_cast<const T*>(from) + (b_ * p_.heads + head(r)) * P_ * p_.states;
    T* H = reinterpret_cast<T*>(state(r));
    for (int64_t n = 0; n < p_.states; ++n)
      for (int64_t j = 0; j < P_; ++j) H[n * Pv_ * W + j] = x[j * p_.state_down + n * p_.state_along];
  }
  void write_states(void* to, int64_t r) {
    if (!to) return;
    T* x = static_cast<T*>(to) + (b_ * p_.heads + head(r)) * P_ * p_.states;
    const T* H = reinterpret_cast<const T*>(state(r));
    for (int64_t n = 0; n < p_.states; ++n)
      for (int64_t j = 0; j < P_; ++j) x[j * p_.state_down + n * p_.state_along] = H[n * Pv_ * W + j];
  }

  // To or from the kept state in front of the chunk.
  template <bool FROM>
  void kept(int64_t r, Vec<T>* H) const {
    const int64_t chunks = (p_.length + Q_ - 1) / Q_, line = R_ * P_;
    const int64_t at = (b_ * chunks + start_ / Q_) * p_.groups + group_;
    T* there = static_cast<T*>(p_.kept) + at * p_.states * line + (head(r) - group_ * R_) * P_;
    for (int64_t n = 0; n < p_.states; ++n)
      if (FROM) load_row<T>(there + n * line, P_, H + n * Pv_);
      else store_row<T>(H + n * Pv_, P_, there + n * line);
  }

  // B, C and their products B_j C_i, i down and j <= i along.
  void read_chunk(int64_t start, bool squares) {
    start_ = start;
    size_ = std::min(Q_, p_.length - start);
    for (int64_t i = 0; i < size_; ++i) {
      load_row<T>(address(p_.B, i, group_, p_.states), p_.states, &B_[i * Nv_]);
      load_row<T>(address(p_.C, i, group_, p_.states), p_.states, &C_[i * Nv_], T(p_.scale));
    }
    if (!squares) return;
    std::fill(B_.begin() + size_ * Nv_, B_.end(), Vec<T>{});
    turn<T>(B_.data(), Nv_, Qv_, turned_.data());
    lower(C_, Nv_, turned_, p_.states, squares_);
  }

  // to (size, size) = a's rows times the turned ones, up to the diagonal at least.
  void lower(const Matrix& a, int64_t pitch, const Matrix& turned, int64_t depth, Matrix& to) const {
    for (int64_t i = 0; i < size_; i += ROWS) {
      const int64_t rows = std::min<int64_t>(ROWS, size_ - i);
      product<T, false>(numbers(a) + i * pitch * W, pitch * W, 1, turned.data(), Qv_, &to[i * Qv_], Qv_,
                        rows, vectors_of<T>(i + rows), depth);
    }
  }

  // x where column j <= i, else 0: what stands there comes from the future and may be anything.
  static Vec<T> upto(int64_t i, int64_t v, Vec<T> x) {
    using I = typename Simd<T>::I;
    if ((v + 1) * W <= i + 1) return x;
    return counting_from<T>(0) <= all<I>(i - v * W) ? x : Vec<T>{};
  }

  int64_t number_of(int64_t i, int64_t r) const {
    return (b_ * p_.length + start_ + i) * p_.heads + head(r);
  }

  void read_values(int64_t i, int64_t r) {
    load(p_.x, i, r, &x_[i * Pv_]);
    if (p_.normalize) column(i, x_) = 1;
    const T dt = dt_[i] = p_.dt ? static_cast<const T*>(p_.dt)[number_of(i, r)] : T(1);
    for (int64_t j = 0; j < Pv_; ++j) written_[i * Pv_ + j] = x_[i * Pv_ + j] * dt;
  }

  // The number behind the values of row i.
  T& column(int64_t i, Matrix& x) const { return numbers(x)[i * Pv_ * W + p_.width]; }

  // The output of step i, gated or divided by its sum of weights.
  void finish_output(int64_t r, int64_t i) {
    Vec<T>* y = &y_[i * Pv_];
    if (p_.z.data) {
      load(p_.z, i, r, room_.data());
      for (int64_t j = 0; j < Pv_; ++j) y[j] *= room_[j] * sigmoid(room_[j]);
    }
    if (p_.normalize) {
      const T sum = static_cast<T*>(p_.sums)[number_of(i, r)] = column(i, y_) + T(p_.eps);
      for (int64_t j = 0; j < Pv_; ++j) y[j] /= sum;
    }
    store(p_.y, i, r, y);
  }

  // As read_head, where nothing decays and there is one document.
  void read_head_without_decay(int64_t r) {
    for (int64_t i = 0; i < size_; ++i) {
      read_values(i, r);
      for (int64_t v = 0; v < Qv_; ++v) {
        weights_[i * Qv_ + v] = upto(i, v, squares_[i * Qv_ + v]);
        decay_[i * Qv_ + v] = all<Vec<T>>(1);
      }
    }
    std::fill(written_.begin() + size_ * Pv_, written_.end(), Vec<T>{});
    std::fill(arriving_.begin(), arriving_.end(), all<Vec<T>>(1));
    std::copy(written_.begin(), written_.begin() + size_ * Pv_, leave_.begin());
    std::fill(skip_.begin(), skip_.end(), Vec<T>{});
  }

  // One head's inputs, decays and weights.
  void read_head(int64_t r) {
    if (!p_.log_decay && !p_.documents) return read_head_without_decay(r);
    using I = typename Simd<T>::I;
    const T infinite = std::numeric_limits<T>::infinity();
    T* arriving = numbers(arriving_);
    T since = 0;
    for (int64_t i = 0; i < size_; ++i) {
      const int64_t time = b_ * p_.length + start_ + i;
      const int64_t earlier = p_.documents && start_ + i ? p_.documents[time - 1] : 0;
      const bool begins = p_.documents && p_.documents[time] != earlier;
      const T* log_decay = static_cast<const T*>(p_.log_decay);
      step_[i] = begins ? -infinite : log_decay ? log_decay[number_of(i, r)] : T(0);
      arriving[i] = since += step_[i];
      read_values(i, r);
      Vec<T>* row = &decay_[i * Qv_];
      for (int64_t v = 0; v < Qv_; ++v) {
        const I before = counting_from<T>(0) < all<I>(i - v * W);
        const Vec<T> sum = i ? row[v - Qv_] + step_[i] : Vec<T>{};
        row[v] = before ? sum : Vec<T>{};
      }
    }
    for (int64_t i = size_; i < Qv_ * W; ++i) arriving[i] = 0;
    std::fill(written_.begin() + size_ * Pv_, written_.end(), Vec<T>{});
    for (Vec<T>& x : arriving_) x = exp(x);
    for (int64_t i = 0; i < size_; ++i)
      for (int64_t v = 0; v < Qv_; ++v) {
        Vec<T>&x = decay_[i * Qv_ + v], &weight = weights_[i * Qv_ + v];
        weight = Vec<T>{};
        if (v * W > i) {
          x = Vec<T>{};
          continue;
        }
        x = upto(i, v, exp(x));
        weight = upto(i, v, x * squares_[i * Qv_ + v]);
      }
    const T* leaving = numbers(decay_) + (size_ - 1) * Qv_ * W;
    for (int64_t i = 0; i < size_; ++i)
      for (int64_t j = 0; j < Pv_; ++j) leave_[i * Pv_ + j] = written_[i * Pv_ + j] * leaving[i];
    std::fill(skip_.begin(), skip_.end(), Vec<T>{});
    if (p_.D) load_row<T>(static_cast<const T*>(p_.D) + head(r) * p_.width, p_.width, skip_.data());
  }

  T whole() { return numbers(arriving_)[size_ - 1]; }

  void decay_states(Vec<T>* H) {
    const T by = whole();
    for (int64_t n = 0; by != 1 && n < p_.states * Pv_; ++n) H[n] *= by;
  }

  // y before the gate.
  void outputs(const Vec<T>* H) {
    product<T, false>(numbers(C_), Nv_ * W, 1, H, Pv_, y_.data(), Pv_, size_, Pv_, p_.states);
    for (int64_t i = 0; i < size_; i += ROWS) {
      const int64_t rows = std::min<int64_t>(ROWS, size_ - i);
      for (int64_t k = i; k < i + rows; ++k)
        for (int64_t j = 0; j < Pv_; ++j)
          y_[k * Pv_ + j] = y_[k * Pv_ + j] * numbers(arriving_)[k] + skip_[j] * x_[k * Pv_ + j];
      product<T, true>(numbers(weights_) + i * Qv_ * W, Qv_ * W, 1, written_.data(), Pv_, &y_[i * Pv_],
                       Pv_, rows, Pv_, i + rows);
    }
  }

  // The gradient of output i, and that of its sum of weights behind it.
  void read_gradient(int64_t i, int64_t r) {
    Vec<T>* g = &g_[i * Pv_];
    load(p_.grad_y, i, r, g);
    if (!p_.normalize) return;
    const T sum = static_cast<const T*>(p_.sums)[number_of(i, r)];
    load(p_.y, i, r, room_.data());
    for (int64_t j = 0; j < Pv_; ++j) g[j] /= sum;
    column(i, g_) = -inner_product<T>(g, room_.data(), Pv_);
  }

  void head_backward(int64_t r) {
    Vec<T>*R = state(r), *H = before_.data();
    std::fill(before_.begin(), before_.end(), Vec<T>{});
    kept<true>(r, H);
    read_head(r);
    for (int64_t i = 0; i < size_; ++i) read_gradient(i, r);
    if (p_.z.data) gate_backward(r, H);
    for (int64_t i = 0; i < size_; ++i)
      for (int64_t j = 0; j < Pv_; ++j) arrived_[i * Pv_ + j] = g_[i * Pv_ + j] * numbers(arriving_)[i];

    // What passes through the states.
    std::vector<T> reads(size_), writes(size_);
    turn<T>(H, Pv_, Nv_, turned_state_.data());
    product<T, false>(numbers(arrived_), Pv_ * W, 1, turned_state_.data(), Nv_, part_.data(), Nv_, size_,
                      Nv_, P_);
    for (int64_t i = 0; i < size_; ++i) {
      reads[i] = inner_product<T>(&C_[i * Nv_], &part_[i * Nv_], Nv_);
      for (int64_t j = 0; j < Nv_; ++j) dC_[i * Nv_ + j] += part_[i * Nv_ + j];
    }
    turn<T>(R, Pv_, Nv_, turned_state_.data());
    product<T, true>(numbers(leave_), Pv_ * W, 1, turned_state_.data(), Nv_, dB_.data(), Nv_, size_, Nv_,
                     P_);
    product<T, false>(numbers(B_), Nv_ * W, 1, R, Pv_, into_.data(), Pv_, size_, Pv_, p_.states);
    const T* leaving = numbers(decay_) + (size_ - 1) * Qv_ * W;
    for (int64_t i = 0; i < size_; ++i) {
      writes[i] = inner_product<T>(&leave_[i * Pv_], &into_[i * Pv_], Pv_);
      for (int64_t j = 0; j < Pv_; ++j) into_[i * Pv_ + j] *= leaving[i];
    }
    const T over_chunk = whole() * inner_product<T>(H, R, p_.states * Pv_);
    decay_states(R);
    product<T, true>(numbers(C_), 1, Nv_ * W, arrived_.data(), Pv_, R, Pv_, p_.states, Pv_, size_);

    // What stays inside the chunk.
    turn<T>(written_.data(), Pv_, Qv_, turned_x_.data());
    lower(g_, Pv_, turned_x_, P_, slopes_);
    for (int64_t i = 0; i < size_; i += ROWS) {
      const int64_t rows = std::min<int64_t>(ROWS, size_ - i);
      product<T, true>(numbers(weights_) + i * Qv_ * W + i, 1, Qv_ * W, &g_[i * Pv_], Pv_,
                       &into_[i * Pv_], Pv_, rows, Pv_, size_ - i);
    }
    std::partial_sum(writes.begin(), writes.end(), writes.begin());
    T later = over_chunk;  // and of all that reads at or after a step
    std::fill(sums_.begin(), sums_.end(), Vec<T>{});
    for (int64_t i = size_ - 1; i >= 0; --i) {
      Vec<T> within{};
      for (int64_t v = 0; v * W <= i; ++v) {
        const int64_t at = i * Qv_ + v;
        const Vec<T> slope = upto(i, v, slopes_[at] * decay_[at]);
        d_squares_[at] += slope;
        if (!p_.d_log_decay) continue;
        sums_[v] += upto(i, v, slope * squares_[at]);  // of the steps from i on, by what they read
        within += upto(i - 1, v, sums_[v]);
      }
      later += reads[i];
      finish(r, i, later + (i ? writes[i - 1] : 0) + lane_sum<T>(within));
    }
  }

  // The gradients of one head's step i, whose decay has got all of its own.
  void finish(int64_t r, int64_t i, T d_decay) {
    const int64_t at = number_of(i, r);
    Vec<T>*into = &into_[i * Pv_], *g = &g_[i * Pv_], *x = &x_[i * Pv_], *dD = &dD_[r * Pv_];
    if (p_.d_log_decay) {
      static_cast<T*>(p_.d_dt)[at] = inner_product<T>(into, x, Pv_);
      static_cast<T*>(p_.d_log_decay)[at] = d_decay;
    }
    for (int64_t j = 0; j < Pv_; ++j) {
      dD[j] += g[j] * x[j];
      into[j] = into[j] * dt_[i] + g[j] * skip_[j];
    }
    store(p_.dx, i, r, into);
  }

  // From the gradient of y to that of y before the gate, and that of z.
  void gate_backward(int64_t r, const Vec<T>* H) {
    outputs(H);
    for (int64_t i = 0; i < size_; ++i) {
      load(p_.z, i, r, room_.data());
      for (int64_t j = 0; j < Pv_; ++j) {
        const Vec<T> z = room_[j], open = sigmoid(z), g = g_[i * Pv_ + j];
        room_[j] = g * y_[i * Pv_ + j] * open * (1 + z * (1 - open));
        g_[i * Pv_ + j] = g * z * open;
      }
      store(p_.dz, i, r, room_.data());
    }
  }

  const Problem& p_;
  const int64_t Q_, Qv_, P_, Pv_, Nv_, R_, blocks_;
  int64_t b_ = 0, group_ = 0, number_ = 0, heads_ = 0, start_ = 0, size_ = 0;
  Matrix B_, C_, turned_, squares_, decay_, weights_, x_, written_, leave_, y_, skip_, room_, sums_;
  Matrix arriving_;
  std::vector<T> dt_, step_;
  Matrix state_;  // of each head of the block, or its gradient
  Matrix g_, arrived_, into_, dB_, dC_, part_, slopes_, d_squares_, before_, turned_state_, turned_x_;
  Matrix dD_;
};

template <class T, class In>
void run(const Problem& p, void (Block<T, In>::*work)(int64_t)) {
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    Block<T, In> block(p);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < block.units(); ++i) (block.*work)(i);
  }
}

}  // namespace

extern "C" {
void forward(const Problem* p) {
  with_dtype(p->dtype, [&](auto sum, auto x) { run(*p, &Block<decltype(sum), decltype(x)>::forward); });
}
void backward(const Problem* p) {
  with_dtype(p->dtype, [&](auto sum, auto x) { run(*p, &Block<decltype(sum), decltype(x)>::backward); });
}
}
