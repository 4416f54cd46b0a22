// A few tokens of linear attention, one after another: the state is read once and written once for
// each. The equations are those of step.py.
#include <cstddef>
#include <vector>

#include "lanes.h"

// Laid out as in cpp.py. q, k (batch, length, heads, K), v, y (batch, length, heads, V) and padding
// (batch, length) are contiguous; the states are in the dtype of sums. Null is what is not given.
extern "C" struct Problem {
  int64_t batch, length, heads, K, V, dtype, normalize, threads;
  double scale, eps;
  const void *q, *k, *v, *S, *z;
  const bool* padding;
  void *y, *S_after, *z_after;
};

template <class T, class In>
class Steps {
 public:
  explicit Steps(const Problem& p) : p_(p), k_(p.K), q_(p.K), v_(p.V), out_(p.V) {}

  // All tokens of one head.
  void run(int64_t b, int64_t h) {
    const int64_t KV = p_.K * p_.V, bh = b * p_.heads + h;
    const T* S = p_.S ? static_cast<const T*>(p_.S) + bh * KV : nullptr;
    const T* z = p_.z ? static_cast<const T*>(p_.z) + bh * p_.K : nullptr;
    T* S_after = static_cast<T*>(p_.S_after) + bh * KV;
    T* z_after = static_cast<T*>(p_.z_after) + bh * p_.K;
    for (int64_t t = 0; t < p_.length; ++t) {
      const int64_t token = b * p_.length + t, row = token * p_.heads + h;
      const bool padding = p_.padding && p_.padding[token];
      load(p_.k, row, p_.K, k_.data());
      load(p_.q, row, p_.K, q_.data());
      load(p_.v, row, p_.V, v_.data());
      if (padding) k_.assign(p_.K, T(0));
      token_of(S, z, S_after, z_after);
      S = S_after;
      z = z_after;
      In* y = static_cast<In*>(p_.y) + row * p_.V;
      for (int64_t j = 0; j < p_.V; ++j) y[j] = convert<In>(padding ? T(0) : out_[j]);
    }
  }

 private:
  static void load(const void* from, int64_t row, int64_t width, T* to) {
    const In* p = static_cast<const In*>(from) + row * width;
    for (int64_t i = 0; i < width; ++i) to[i] = convert<T>(p[i]);
  }

  void token_of(const T* S, const T* z, T* S_after, T* z_after) {
    for (T& q : q_) q *= static_cast<T>(p_.scale);
    for (int64_t i = 0; i < p_.K; ++i) z_after[i] = (z ? z[i] : T(0)) + k_[i];
    constexpr int64_t W = WIDTH<T>;
    int64_t j = 0;
    for (; j + 4 * W <= p_.V; j += 4 * W) columns<4>(S, S_after, j);
    for (; j + W <= p_.V; j += W) columns<1>(S, S_after, j);
    for (; j < p_.V; ++j) {
      out_[j] = 0;
      for (int64_t i = 0; i < p_.K; ++i) {
        const int64_t at = i * p_.V + j;
        S_after[at] = (S ? S[at] : T(0)) + k_[i] * v_[j];
        out_[j] += q_[i] * S_after[at];
      }
    }
    if (!p_.normalize) return;
    T weight = static_cast<T>(p_.eps);
    for (int64_t i = 0; i < p_.K; ++i) weight += q_[i] * z_after[i];
    for (T& y : out_) y /= weight;
  }

  static Loose<T>* vectors(T* at) { return reinterpret_cast<Loose<T>*>(at); }
  static const Loose<T>* vectors(const T* at) { return reinterpret_cast<const Loose<T>*>(at); }

  // N vectors of the state's columns from j on: their sums stay in registers.
  template <int N>
  void columns(const T* S, T* S_after, int64_t j) {
    Vec<T> v[N], out[N]{};
    for (int n = 0; n < N; ++n) v[n] = vectors(&v_[j])[n];
    for (int64_t i = 0; i < p_.K; ++i) {
      const T k = k_[i], q = q_[i];
      const Loose<T>* before = S ? vectors(S + i * p_.V + j) : nullptr;
      Loose<T>* after = vectors(S_after + i * p_.V + j);
      for (int n = 0; n < N; ++n) {
        const Vec<T> now = k * v[n] + (S ? before[n] : Vec<T>{});
        after[n] = now;
        out[n] += q * now;
      }
    }
    for (int n = 0; n < N; ++n) vectors(&out_[j])[n] = out[n];
  }

  const Problem& p_;
  std::vector<T> k_, q_, v_, out_;
};

template <class T, class In>
void all_heads(const Problem& p) {
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    Steps<T, In> steps(p);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.batch * p.heads; ++i) steps.run(i / p.heads, i % p.heads);
  }
}

extern "C" void steps(const Problem* p) {
  with_dtype(p->dtype, [&](auto sum, auto x) { all_heads<decltype(sum), decltype(x)>(*p); });
}
