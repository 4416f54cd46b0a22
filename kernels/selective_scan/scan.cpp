// The selective scan of kernels/selective_scan/__init__.py, forward and backward, in one pass over
// the inputs: lanes are channels, so that a step needs no sum across lanes, and B and C broadcast.
//
// B batch, D channels, L time, N state, G groups, V vectors over channels. The work is cut into
// units of one row and V * WIDTH channels of one group, whatever the number of threads, so that
// sums have one order. A unit goes through time in tiles, whose inputs are laid out first as
// (steps, V) vectors; lanes behind the last channel hold zeros.

#include <algorithm>
#include <memory>

#include "arrays.h"

namespace {
constexpr int V = 4;  // enough independent chains of operations to keep the processor busy
template <class T>
constexpr int CHANNELS = V * WIDTH<T>;            // of a unit
enum Flag : uint8_t { PLAIN, RESTART, PADDING };  // what segments say about a position
}  // namespace

// Laid out as in cpp.py. Plain pointers are contiguous and in the dtype of states.
extern "C" struct Problem {
  int64_t batch, channels, length, states, groups, steps, threads, delta_softplus;
  Array u, delta, B, C, z;
  const void *A, *D, *delta_bias, *initial_state;  // (D, N), (D,), (D,), (B, D, N), or null
  const uint8_t* flags;                            // (B, L), or null
  void* kept;  // (tiles, B, N, D), the states in front of the tiles; null: not kept
  // Forward only: y, and the last state (B, D, N).
  Array y;
  void* last;
  // Backward only. Parts are to be summed over their first dimension.
  Array grad_y, grad_u, grad_delta, grad_z;
  const void* grad_last;         // (B, D, N)
  void *grad_initial, *parts_A;  // (B, D, N)
  void *parts_D, *parts_bias;    // (B, D)
  void *parts_B, *parts_C;       // (chunks, B, G, L, N)
};

namespace {

template <class T>
using Buffer = std::unique_ptr<Vec<T>[]>;

template <class T>
Buffer<T> buffer(int64_t size) {
  return Buffer<T>(new Vec<T>[size]());
}

template <class T>
int64_t num_chunks(const Problem& p) {
  return (p.channels / p.groups + CHANNELS<T> - 1) / CHANNELS<T>;
}

// One row and up to CHANNELS channels of one group.
template <class T>
struct Unit {
  static constexpr int W = WIDTH<T>;
  const Problem& p;
  const int64_t N, pitch;  // pitch: of B and C in a tile, N rounded up to whole vectors
  int64_t row, group, chunk, channel;
  int channels;
  Vec<T> skip[V]{}, bias[V]{};
  Buffer<T> rates, state;             // (N, V): A log2(e), and h or its adjoint
  Buffer<T> B, C;                     // (steps, pitch) numbers
  Buffer<T> u, delta, step, z, y, g;  // (steps, V)

  Unit(const Problem& p, int64_t index)
      : p(p), N(p.states), pitch((p.states + W - 1) / W * W) {
    const int64_t width = p.channels / p.groups;
    chunk = index % num_chunks<T>(p);
    group = index / num_chunks<T>(p) % p.groups;
    row = index / num_chunks<T>(p) / p.groups;
    channel = group * width + chunk * CHANNELS<T>;
    channels = static_cast<int>(std::min<int64_t>(CHANNELS<T>, (group + 1) * width - channel));
    for (Buffer<T>* each : {&rates, &state}) *each = buffer<T>(N * V);
    for (Buffer<T>* each : {&B, &C}) *each = buffer<T>(p.steps * pitch / W);
    for (Buffer<T>* each : {&u, &delta, &step, &z, &y, &g}) *each = buffer<T>(p.steps * V);
    gather(p.A, channel, N, rates.get());
    for (int64_t i = 0; i < N * V; ++i) rates[i] *= T(LOG2E);
    if (p.D) gather(p.D, channel, 1, skip);
    if (p.delta_bias) gather(p.delta_bias, channel, 1, bias);
  }

  // The unit's channels in a tensor (B, D, ...).
  int64_t of_row() const { return row * p.channels + channel; }

  // (D, size) -> (size, V) vectors, and back; `first` counts the rows of the former.
  void gather(const void* from, int64_t first, int64_t size, Vec<T>* out) const {
    const T* x = static_cast<const T*>(from) + first * size;
    T* lanes = reinterpret_cast<T*>(out);
    for (int i = 0; i < channels; ++i)
      for (int64_t n = 0; n < size; ++n) lanes[n * CHANNELS<T> + i] = x[i * size + n];
  }

  void scatter(const Vec<T>* in, int64_t first, int64_t size, void* to) const {
    T* x = static_cast<T*>(to) + first * size;
    const T* lanes = reinterpret_cast<const T*>(in);
    for (int i = 0; i < channels; ++i)
      for (int64_t n = 0; n < size; ++n) x[i * size + n] = lanes[n * CHANNELS<T> + i];
  }

  void read(const Array& array, int64_t start, int steps, Vec<T>* out) const {
    for (int i = 0; i < channels; i += W)
      load<T>(array, {row, 0, channel + i, start, std::min(W, channels - i), steps},
              reinterpret_cast<T*>(out) + i, CHANNELS<T>);
  }

  void write(const Array& array, int64_t start, int steps, const Vec<T>* in) const {
    for (int i = 0; i < channels; i += W)
      store<T>(array, {row, 0, channel + i, start, std::min(W, channels - i), steps}, in + i / W,
               V);
  }

  void read_tile(int64_t start, int steps) {
    for (int64_t n = 0; n < N; n += W) {
      const Piece at{row, group, n, start, static_cast<int>(std::min<int64_t>(W, N - n)), steps};
      load<T>(p.B, at, reinterpret_cast<T*>(B.get()) + n, pitch);
      load<T>(p.C, at, reinterpret_cast<T*>(C.get()) + n, pitch);
    }
    read(p.u, start, steps, u.get());
    read(p.delta, start, steps, delta.get());
    if (p.z.data) read(p.z, start, steps, z.get());
    for (int t = 0; t < steps; ++t)
      for (int j = 0; j < V; ++j) {
        const Vec<T> sum = delta[t * V + j] += bias[j];
        const Vec<T> size = p.delta_softplus ? softplus(sum) : sum;
        step[t * V + j] = flag(start + t) == PADDING ? Vec<T>{} : size;
      }
  }

  Flag flag(int64_t t) const { return p.flags ? Flag(p.flags[row * p.length + t]) : PLAIN; }

  // y before the gate, and h in the place of `h`; with KEEP also every decay and state.
  template <bool KEEP>
  void advance(int64_t start, int steps, Vec<T>* __restrict__ h, Vec<T>* __restrict__ decays,
               Vec<T>* __restrict__ states) {
    const Vec<T>* __restrict__ rate = rates.get();
    for (int t = 0; t < steps; ++t) {
      const T* b = reinterpret_cast<const T*>(B.get()) + t * pitch;
      const T* c = reinterpret_cast<const T*>(C.get()) + t * pitch;
      const bool restart = flag(start + t) == RESTART;
      if (restart) std::fill(h, h + N * V, Vec<T>{});
      Vec<T> size[V], input[V], sum[V];
      for (int j = 0; j < V; ++j) {
        size[j] = step[t * V + j];
        input[j] = size[j] * u[t * V + j];
        sum[j] = skip[j] * u[t * V + j];
      }
      for (int64_t n = 0; n < N; ++n) {
        Vec<T> a[V];
        exp2_products<V>(size, rate + n * V, a);
        for (int j = 0; j < V; ++j) {
          const Vec<T> now = a[j] * h[n * V + j] + input[j] * b[n];
          h[n * V + j] = now;
          sum[j] += now * c[n];
          if constexpr (KEEP) {
            decays[(t * N + n) * V + j] = restart ? Vec<T>{} : a[j];
            states[(t * N + n) * V + j] = now;
          }
        }
      }
      for (int j = 0; j < V; ++j) y[t * V + j] = sum[j];
    }
  }

  // To or from the kept states in front of a tile.
  template <bool FROM>
  void copy_kept(int64_t tile, Vec<T>* h) const {
    T* kept = static_cast<T*>(p.kept) + (tile * p.batch + row) * N * p.channels + channel;
    for (int64_t n = 0; n < N; ++n) {
      T *lanes = reinterpret_cast<T*>(h + n * V), *there = kept + n * p.channels;
      if (FROM)
        std::copy(there, there + channels, lanes);
      else
        std::copy(lanes, lanes + channels, there);
    }
  }

  void forward() {
    if (p.initial_state) gather(p.initial_state, of_row(), N, state.get());
    for (int64_t start = 0; start < p.length; start += p.steps) {
      const int steps = static_cast<int>(std::min(p.steps, p.length - start));
      if (p.kept) copy_kept<false>(start / p.steps, state.get());
      read_tile(start, steps);
      advance<false>(start, steps, state.get(), nullptr, nullptr);
      for (int i = 0; p.z.data && i < steps * V; ++i) y[i] *= z[i] * sigmoid(z[i]);
      write(p.y, start, steps, y.get());
    }
    scatter(state.get(), of_row(), N, p.last);
  }
};

// The backward pass of a unit, last tile first; `state` is the adjoint that a tile hands on.
template <class T>
struct Backward : Unit<T> {
  using Unit<T>::p, Unit<T>::N, Unit<T>::W, Unit<T>::pitch, Unit<T>::row, Unit<T>::state;
  using Unit<T>::u, Unit<T>::delta, Unit<T>::step, Unit<T>::z, Unit<T>::y, Unit<T>::g;
  Buffer<T> h, grad_A;          // (N, V)
  Buffer<T> decays, states;     // (steps, N, V)
  Buffer<T> sums_B, sums_C;     // (steps, pitch), over the unit's vectors
  Buffer<T> grad_u, grad_step;  // (steps, V)
  Vec<T> grad_D[V]{}, grad_bias[V]{};

  Backward(const Problem& p, int64_t index) : Unit<T>(p, index) {
    for (Buffer<T>* each : {&h, &grad_A}) *each = buffer<T>(N * V);
    for (Buffer<T>* each : {&decays, &states}) *each = buffer<T>(p.steps * N * V);
    for (Buffer<T>* each : {&sums_B, &sums_C}) *each = buffer<T>(p.steps * pitch);
    for (Buffer<T>* each : {&grad_u, &grad_step}) *each = buffer<T>(p.steps * V);
  }

  void backward() {
    const int64_t at = this->of_row();
    this->gather(p.grad_last, at, N, state.get());
    for (int64_t tile = (p.length - 1) / p.steps; tile >= 0; --tile) tile_backward(tile);
    this->scatter(state.get(), at, N, p.grad_initial);
    this->scatter(grad_A.get(), at, N, p.parts_A);
    this->scatter(grad_D, at, 1, p.parts_D);
    this->scatter(grad_bias, at, 1, p.parts_bias);
  }

  void tile_backward(int64_t tile) {
    const int64_t start = tile * p.steps;
    const int steps = static_cast<int>(std::min(p.steps, p.length - start));
    this->read_tile(start, steps);
    this->read(p.grad_y, start, steps, g.get());
    this->template copy_kept<true>(tile, h.get());
    this->template advance<true>(start, steps, h.get(), decays.get(), states.get());
    if (p.z.data) gate_backward(start, steps);
    this->template copy_kept<true>(tile, h.get());  // advance() left the tile's last state there
    adjoint(steps);
    for (int t = 0; t < steps; ++t)
      for (int j = 0; j < V; ++j) {
        const int i = t * V + j;
        grad_D[j] += g[i] * u[i];
        if (this->flag(start + t) == PADDING) grad_step[i] = Vec<T>{};
        if (p.delta_softplus) grad_step[i] *= softplus_slope(delta[i]);
        grad_bias[j] += grad_step[i];
      }
    this->write(p.grad_u, start, steps, grad_u.get());
    this->write(p.grad_delta, start, steps, grad_step.get());
    write_shared(sums_B.get(), start, steps, p.parts_B);
    write_shared(sums_C.get(), start, steps, p.parts_C);
  }

  // From the gradient of y to that of y before the gate, in place, and that of z.
  void gate_backward(int64_t start, int steps) {
    for (int i = 0; i < steps * V; ++i) {
      const Vec<T> open = sigmoid(z[i]);
      const Vec<T> grad = g[i] * y[i] * open * (1 + z[i] * (1 - open));
      g[i] *= z[i] * open;
      z[i] = grad;
    }
    this->write(p.grad_z, start, steps, z.get());
  }

  // lam_t = C_t g_t + a_{t+1} lam_{t+1}, and from it all gradients but those of the gate.
  void adjoint(int steps) {
    const Vec<T>* __restrict__ rate = this->rates.get();
    Vec<T>* __restrict__ later = state.get();
    Vec<T>* __restrict__ by_rate = grad_A.get();
    for (int t = steps - 1; t >= 0; --t) {
      const T* b = reinterpret_cast<const T*>(this->B.get()) + t * pitch;
      const T* c = reinterpret_cast<const T*>(this->C.get()) + t * pitch;
      const Vec<T>* __restrict__ a = decays.get() + t * N * V;
      const Vec<T>* __restrict__ here = states.get() + t * N * V;
      const Vec<T>* __restrict__ before = t ? here - N * V : h.get();
      Vec<T> size[V], input[V], grad[V], into[V]{}, by_step[V]{};
      for (int j = 0; j < V; ++j) {
        size[j] = step[t * V + j];
        input[j] = size[j] * u[t * V + j];
        grad[j] = g[t * V + j];
      }
      for (int64_t n = 0; n < N; ++n) {
        Vec<T> sum_b{}, sum_c{};
        for (int j = 0; j < V; ++j) {
          const int64_t i = n * V + j;
          const Vec<T> lam = c[n] * grad[j] + later[i];
          const Vec<T> earlier = a[i] * lam;
          const Vec<T> exponent = earlier * before[i];
          later[i] = earlier;
          sum_c += grad[j] * here[i];
          sum_b += lam * input[j];
          into[j] += lam * b[n];
          by_step[j] += exponent * rate[i];
          by_rate[i] += exponent * size[j];
        }
        sums_B[t * pitch + n] = sum_b;
        sums_C[t * pitch + n] = sum_c;
      }
      for (int j = 0; j < V; ++j) {
        grad_u[t * V + j] = size[j] * into[j] + this->skip[j] * grad[j];
        grad_step[t * V + j] = by_step[j] * T(1 / LOG2E) + u[t * V + j] * into[j];
      }
    }
  }

  void write_shared(const Vec<T>* sums, int64_t start, int steps, void* parts) const {
    const int64_t before = (this->chunk * p.batch + row) * p.groups + this->group;
    T* to = static_cast<T*>(parts) + (before * p.length + start) * N;
    for (int t = 0; t < steps; ++t)
      for (int64_t n = 0; n < N; n += W) {
        const Vec<T> sum = lane_sums<T>(sums + t * pitch + n);
        std::memcpy(to + t * N + n, &sum, std::min<int64_t>(W, N - n) * sizeof(T));
      }
  }
};

template <class T>
void forward(const Problem& p) {
  const int64_t units = p.batch * p.groups * num_chunks<T>(p);
#pragma omp parallel for schedule(dynamic) num_threads(p.threads)
  for (int64_t i = 0; i < units; ++i) Unit<T>(p, i).forward();
}

template <class T>
void backward(const Problem& p) {
  const int64_t units = p.batch * p.groups * num_chunks<T>(p);
#pragma omp parallel for schedule(dynamic) num_threads(p.threads)
  for (int64_t i = 0; i < units; ++i) Backward<T>(p, i).backward();
}

}  // namespace

extern "C" {
int64_t chunks32(const Problem* p) { return num_chunks<float>(*p); }
int64_t chunks64(const Problem* p) { return num_chunks<double>(*p); }
void forward32(const Problem* p) { forward<float>(*p); }
void forward64(const Problem* p) { forward<double>(*p); }
void backward32(const Problem* p) { backward<float>(*p); }
void backward64(const Problem* p) { backward<double>(*p); }
}
