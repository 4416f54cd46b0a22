// The recurrence and its gradient, rows of some channels walked over once: a state stays in the cache
// while its inputs stream by. Complex numbers stand as pairs, real part first.
#include <algorithm>
#include <vector>

#include "lanes.h"

// Rows (batch, time, width) of numbers that stand side by side; the strides count numbers.
struct Rows {
  void* data;
  int64_t batch, time;
};

// Laid out as in cpp.py. `width` counts the real numbers of a row; h0 and d_h0 (batch, width) are
// contiguous. h is written forward and read backward.
extern "C" struct Problem {
  int64_t batch, length, width, is_double, is_complex, threads;
  Rows a, b, h;
  const void* h0;
  Rows grad, d_a, d_b;  // these are for the backward pass only
  void* d_h0;
};

namespace {

// The product of a, or its conjugate, and x, number by number.
template <class T, bool COMPLEX, bool CONJUGATE>
inline Vec<T> times(Vec<T> a, Vec<T> x) {
  if constexpr (!COMPLEX) return a * x;
  const auto odd = (counting_from<T>(0) & 1) != 0;
  const Vec<T> swapped = swap_halves<T>(a, 1);
  const Vec<T> real = odd ? swapped : a;
  const Vec<T> cross = CONJUGATE ? (odd ? -a : swapped) : (odd ? a : -swapped);
  return real * x + cross * swap_halves<T>(x, 1);
}

constexpr int64_t MOST_VECTORS = 64;  // of a row's piece: its states fit the smallest cache

// Some neighbouring channels of one sequence.
template <class T, bool COMPLEX>
class Channels {
 public:
  Channels(const Problem& p, int64_t b, int64_t first, int64_t end)
      : p_(p), b_(b), first_(first), end_(end), state_((end - first + W - 1) / W) {}

  void forward() {
    read(p_.h0);
    for (int64_t t = 0; t < p_.length; ++t) {
      const T *a = row(p_.a, t), *b = row(p_.b, t);
      T* h = row(p_.h, t);
      each([&](int64_t i, auto load, auto store) {
        Vec<T>& x = state_[i / W];
        x = load(b + i) + times<T, COMPLEX, false>(load(a + i), x);
        store(h + i, x);
      });
    }
  }

  // The state is what the gradient of the state before gets from here: conj(a_t) g_t.
  void backward() {
    for (int64_t t = p_.length - 1; t >= 0; --t) {
      const T *a = row(p_.a, t), *grad = row(p_.grad, t);
      const T* h = t ? row(p_.h, t - 1) : numbers<const T>(p_.h0);
      T *d_a = row(p_.d_a, t), *d_b = row(p_.d_b, t);
      each([&](int64_t i, auto load, auto store) {
        const Vec<T> g = load(grad + i) + state_[i / W];
        store(d_b + i, g);
        store(d_a + i, times<T, COMPLEX, true>(load(h + i), g));
        state_[i / W] = times<T, COMPLEX, true>(load(a + i), g);
      });
    }
    T* to = numbers<T>(p_.d_h0);
    each([&](int64_t i, auto, auto store) { store(to + i, state_[i / W]); });
  }

 private:
  static constexpr int64_t W = WIDTH<T>;

  T* row(const Rows& x, int64_t t) const {
    return static_cast<T*>(x.data) + b_ * x.batch + t * x.time + first_;
  }
  template <class S, class P>
  S* numbers(P* x) const {
    return static_cast<S*>(x) + b_ * p_.width + first_;
  }

  // Calls f(first number, how to load, how to store) for each vector; the last may be cut short.
  template <class F>
  void each(F f) const {
    const int64_t width = end_ - first_, rest = width % W;
    for (int64_t i = 0; i + W <= width; i += W) f(i, load_of<W>, store_of<W>);
    if (!rest) return;
    const auto load = [rest](const T* from) {
      Vec<T> x{};
      std::memcpy(&x, from, rest * sizeof(T));
      return x;
    };
    f(width - rest, load, [rest](T* to, Vec<T> x) { std::memcpy(to, &x, rest * sizeof(T)); });
  }
  template <int64_t N>
  static Vec<T> load_of(const T* from) {
    Vec<T> x;
    std::memcpy(&x, from, N * sizeof(T));
    return x;
  }
  template <int64_t N>
  static void store_of(T* to, Vec<T> x) {
    std::memcpy(to, &x, N * sizeof(T));
  }

  void read(const void* from) {
    const T* h0 = numbers<const T>(from);
    each([&](int64_t i, auto load, auto) { state_[i / W] = load(h0 + i); });
  }

  const Problem& p_;
  const int64_t b_, first_, end_;
  std::vector<Vec<T>> state_;
};

template <class T, bool COMPLEX>
void run(const Problem& p, void (Channels<T, COMPLEX>::*walk)()) {
  const int64_t vectors = (p.width + WIDTH<T> - 1) / WIDTH<T>;
  const int64_t fair = (vectors * p.batch + p.threads - 1) / p.threads;
  const int64_t size = std::min({vectors, fair, MOST_VECTORS}) * WIDTH<T>;
  const int64_t pieces = (p.width + size - 1) / size;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.threads > 1)
  for (int64_t i = 0; i < p.batch * pieces; ++i) {
    const int64_t first = i % pieces * size;
    Channels<T, COMPLEX> channels(p, i / pieces, first, std::min(first + size, p.width));
    (channels.*walk)();
  }
}

template <class T>
void run_forward(const Problem& p) {
  p.is_complex ? run(p, &Channels<T, true>::forward) : run(p, &Channels<T, false>::forward);
}

template <class T>
void run_backward(const Problem& p) {
  p.is_complex ? run(p, &Channels<T, true>::backward) : run(p, &Channels<T, false>::backward);
}

}  // namespace

extern "C" {
void forward(const Problem* p) { p->is_double ? run_forward<double>(*p) : run_forward<float>(*p); }
void backward(const Problem* p) { p->is_double ? run_backward<double>(*p) : run_backward<float>(*p); }
}
