// Depthwise causal convolution and its gradients in one pass over time: shifted.py's equations.
//
// Rows of channels go by one after another; a ring holds the last W of them, as wide as sums are.
// Rows that are whole vectors of that width already are read and written where they lie.
// Time is cut into stretches of `chunk` tokens, which are independent: each reads the W - 1 rows in
// front of it again. Gradients of taps and bias are summed by stretch, so that the number of
// threads does not change a bit of them.
#include <algorithm>
#include <new>
#include <vector>

#include "lanes.h"

// A tensor (batch, time, channel) whose channels lie side by side; strides count elements.
struct Rows {
  void* data;
  int64_t dtype, batch, time;
};

// Laid out as in cpp.py. `taps` (W, channels), `bias` (channels), `state` (batch, W - 1, channels)
// and the gradients other than dx are in the dtype of sums. Null is what is not given.
extern "C" struct Problem {
  int64_t batch, length, channels, width, silu, chunk, threads;
  Rows x, y, grad_y, dx;
  const void *taps, *bias, *state;
  const int32_t* reach;  // (batch, length): how many tokens in front each looks back at
  void *d_state, *parts_taps, *parts_bias;  // of each stretch: (stretches, W, channels), (.., channels)
};

template <class T>
class Aligned {
 public:
  explicit Aligned(int64_t size)
      : data_(static_cast<T*>(::operator new[](size * sizeof(T), std::align_val_t(64)))) {
    std::fill_n(data_, size, T(0));
  }
  ~Aligned() { ::operator delete[](data_, std::align_val_t(64)); }
  Aligned(const Aligned&) = delete;
  Vec<T>* row(int64_t i, int64_t vectors) { return reinterpret_cast<Vec<T>*>(data_) + i * vectors; }

 private:
  T* data_;
};

template <class T, class S>
void load_from(const Rows& rows, int64_t b, int64_t t, int64_t channels, T* out) {
  const S* p = static_cast<const S*>(rows.data) + b * rows.batch + t * rows.time;
  for (int64_t d = 0; d < channels; ++d) out[d] = convert<T>(p[d]);
}

template <class T>
void load(const Rows& rows, int64_t b, int64_t t, int64_t channels, Vec<T>* out) {
  T* to = reinterpret_cast<T*>(out);
  with_dtype(rows.dtype, [&](auto, auto x) { load_from<T, decltype(x)>(rows, b, t, channels, to); });
}

template <class T, class S>
void store_to(const Rows& rows, int64_t b, int64_t t, int64_t channels, const T* in) {
  S* p = static_cast<S*>(rows.data) + b * rows.batch + t * rows.time;
  for (int64_t d = 0; d < channels; ++d) p[d] = convert<S>(in[d]);
}

template <class T>
void store(const Rows& rows, int64_t b, int64_t t, int64_t channels, const Loose<T>* in) {
  const T* from = reinterpret_cast<const T*>(in);
  with_dtype(rows.dtype, [&](auto, auto x) { store_to<T, decltype(x)>(rows, b, t, channels, from); });
}

// One stretch of one sequence: tokens first .. end.
template <class T>
class Stretch {
 public:
  Stretch(const Problem& p, int64_t number)
      : p_(p),
        stretches_((p.length + p.chunk - 1) / p.chunk),
        number_(number),
        b_(number / stretches_),
        first_(number % stretches_ * p.chunk),
        end_(std::min(first_ + p.chunk, p.length)),
        vectors_((p.channels + WIDTH<T> - 1) / WIDTH<T>),
        whole_(p.channels % WIDTH<T> == 0),
        memory_((4 * p.width + 3) * vectors_ * WIDTH<T>),
        taps_at_(p.width),
        inputs_at_(p.width) {
    for (int64_t j = 0; j < p.width; ++j) copy(taps(j), p.taps, j);
    if (p.bias) copy(bias(), p.bias, 0);
    for (int64_t t = first_ - p.width + 1; t < first_; ++t) read(t);
  }

  void forward() {
    for (int64_t t = first_; t < end_; ++t) {
      read(t);
      Loose<T>* y = in_place(p_.y) ? row(p_.y, t) : out();
      p_.silu ? sum<true>(t, y) : sum<false>(t, y);
      if (!in_place(p_.y)) store<T>(p_.y, b_, t, p_.channels, y);
    }
  }

  void backward() {
    const int64_t W = p_.width, last = std::min(end_ + W - 1, p_.length);
    for (int64_t t = first_; t < last; ++t) {
      read(t);
      Vec<T>* g = gradient(t);
      load<T>(p_.grad_y, b_, t, p_.channels, g);
      if (p_.silu) {
        sum<false>(t, out());
        for (int64_t i = 0; i < vectors_; ++i) {
          const Vec<T> u = out()[i], s = sigmoid(u);
          g[i] *= s * (1 + u * (1 - s));
        }
      }
      if (t < end_) {  // the next stretch counts the others
        for (int64_t i = 0; i < vectors_; ++i) d_bias()[i] += g[i];
        for (int64_t j = 0; j <= reach(t); ++j) {
          Vec<T>* d = d_taps(W - 1 - j);
          const Loose<T>* x = input(t - j);
          for (int64_t i = 0; i < vectors_; ++i) d[i] += g[i] * x[i];
        }
      }
      finish(t - W + 1);
    }
    for (int64_t s = last - W + 1; s < end_; ++s) finish(s);
    write(p_.parts_bias, number_, d_bias());
    for (int64_t j = 0; j < W; ++j) write(p_.parts_taps, number_ * W + j, d_taps(j));
  }

 private:
  Vec<T>* taps(int64_t j) { return memory_.row(j, vectors_); }
  Vec<T>* d_taps(int64_t j) { return memory_.row(p_.width + j, vectors_); }
  Vec<T>* ring(int64_t t) { return memory_.row(2 * p_.width + slot(t), vectors_); }
  Vec<T>* gradient(int64_t t) { return memory_.row(3 * p_.width + slot(t), vectors_); }
  Vec<T>* bias() { return memory_.row(4 * p_.width, vectors_); }
  Vec<T>* d_bias() { return memory_.row(4 * p_.width + 1, vectors_); }
  Loose<T>* out() { return memory_.row(4 * p_.width + 2, vectors_); }

  int64_t slot(int64_t t) const { return (t + p_.width) % p_.width; }
  int64_t reach(int64_t t) const { return p_.reach ? p_.reach[b_ * p_.length + t] : p_.width - 1; }

  bool in_place(const Rows& rows) const {
    return whole_ && rows.dtype == (sizeof(T) == 4 ? FLOAT32 : FLOAT64);
  }
  Loose<T>* row(const Rows& rows, int64_t t) const {
    return reinterpret_cast<Loose<T>*>(static_cast<T*>(rows.data) + b_ * rows.batch + t * rows.time);
  }
  const Loose<T>* input(int64_t t) { return t >= 0 && in_place(p_.x) ? row(p_.x, t) : ring(t); }

  void copy(Vec<T>* to, const void* from, int64_t row) {
    std::memcpy(to, static_cast<const T*>(from) + row * p_.channels, p_.channels * sizeof(T));
  }
  void write(void* to, int64_t row, const Loose<T>* from) {
    std::memcpy(static_cast<T*>(to) + row * p_.channels, from, p_.channels * sizeof(T));
  }

  // Puts the input at t into the ring; in front of the sequence stands the state, or nothing.
  void read(int64_t t) {
    if (t >= 0 && in_place(p_.x)) return;
    if (t >= 0) return load<T>(p_.x, b_, t, p_.channels, ring(t));
    if (p_.state) copy(ring(t), p_.state, b_ * (p_.width - 1) + p_.width - 1 + t);
  }

  // to = bias + the inputs that t sees, by their taps.
  template <bool SILU>
  void sum(int64_t t, Loose<T>* to) {
    const int64_t n = reach(t) + 1;
    if (n == 4) return sum_of<SILU, 4>(t, n, to);
    sum_of<SILU, 0>(t, n, to);
  }

  // N, where it is not 0, is n: the compiler then keeps the whole sum in registers.
  template <bool SILU, int N>
  void sum_of(int64_t t, int64_t n, Loose<T>* to) {
    for (int64_t j = 0; j < n; ++j) {
      taps_at_[j] = taps(p_.width - 1 - j);
      inputs_at_[j] = input(t - j);
    }
    for (int64_t i = 0; i < vectors_; ++i) {
      Vec<T> u = bias()[i];
      for (int64_t j = 0; j < (N ? N : n); ++j) u += taps_at_[j][i] * static_cast<const Loose<T>*>(inputs_at_[j])[i];
      to[i] = SILU ? u * sigmoid(u) : u;
    }
  }

  // The gradient of the input at s, which tokens s .. s + W - 1 see. What lies in front of the
  // first stretch is the state; what lies in front of another is that of the one before.
  void finish(int64_t s) {
    if (s >= end_ || s < (first_ ? first_ : 1 - p_.width)) return;
    std::fill_n(out(), vectors_, Loose<T>{});
    for (int64_t j = std::max<int64_t>(0, -s); j < p_.width && s + j < p_.length; ++j) {
      if (reach(s + j) < j) continue;
      Vec<T>*w = taps(p_.width - 1 - j), *g = gradient(s + j);
      Loose<T>* dx = out();
      for (int64_t i = 0; i < vectors_; ++i) dx[i] += w[i] * g[i];
    }
    if (s >= 0) return store<T>(p_.dx, b_, s, p_.channels, out());
    write(p_.d_state, b_ * (p_.width - 1) + p_.width - 1 + s, out());
  }

  const Problem& p_;
  const int64_t stretches_, number_, b_, first_, end_, vectors_;
  const bool whole_;
  Aligned<T> memory_;
  std::vector<const Vec<T>*> taps_at_;
  std::vector<const void*> inputs_at_;
};

template <class T>
void each_stretch(const Problem& p, void (Stretch<T>::*work)()) {
  const int64_t stretches = p.batch * ((p.length + p.chunk - 1) / p.chunk);
#pragma omp parallel for schedule(static) num_threads(p.threads) if (stretches > 1)
  for (int64_t i = 0; i < stretches; ++i) (Stretch<T>(p, i).*work)();
}

extern "C" {
void forward32(const Problem* p) { each_stretch<float>(*p, &Stretch<float>::forward); }
void forward64(const Problem* p) { each_stretch<double>(*p, &Stretch<double>::forward); }
void backward32(const Problem* p) { each_stretch<float>(*p, &Stretch<float>::backward); }
void backward64(const Problem* p) { each_stretch<double>(*p, &Stretch<double>::backward); }
}
