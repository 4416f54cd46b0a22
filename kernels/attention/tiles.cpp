// Softmax attention of bf16 tensors, forward and backward, with the equations of triton.py. Scores,
// sums and gradients are float32; weights, and the gradients of scores, are rounded to bf16 where
// they are factors.
//
// Scores stand with keys down and queries along, in whose lanes all sums over keys are made. A key
// head of one sequence is one unit of work: its keys and values are laid out for the tiles once, for
// all of the heads that read them. Backward goes over the scores once, a block of keys at a time.
#include <algorithm>
#include <limits>

#include "tiles.h"

constexpr int64_t BLOCK = 64;   // queries, or keys, that are masked or not together
constexpr int64_t PANEL = 256;  // keys of a block of queries, or queries of a block of keys, at a time
constexpr int LANES = BLOCK / WIDTH<float>;  // vectors along a block

// Laid out as in cpp.py. Tokens are bf16, all else is contiguous. Null is what is not given.
extern "C" struct Problem {
  int64_t batch, length, keys, heads, groups, width, threads;
  double scale;             // of scores
  Tokens q, k, v, y;
  const int32_t *low, *high;  // (batch, length): the first key and the end of what a query sees,
  const bool* there;        // (batch, keys): but for padding
  float* log_sums;          // (batch, heads, length): of exponentials; 0 where a query sees no key
  Tokens grad_y, dq, dk, dv;  // these are for the backward pass only
  const float* grad_log_sums;  // (batch, heads, length)
};

namespace {

using Int = Simd<float>::I;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

int64_t whole_blocks(int64_t size) { return (size + BLOCK - 1) / BLOCK * BLOCK; }

// What a block of queries sees.
struct Sight {
  int64_t first = std::numeric_limits<int64_t>::max(), end = 0;  // of any of them
  int64_t all_first = 0, all_end = std::numeric_limits<int64_t>::max();  // of every one
};

class Unit {
 public:
  Unit(const Problem& p, const Multiplier& multiplier)
      : p_(p),
        multiplier_(multiplier),
        T_(whole_blocks(p.length)),
        S_(whole_blocks(p.keys)),
        deep_(steps_of(p.width)),
        tiles_(tiles_of(p.width)),
        k_(S_, deep_),
        v_(S_, deep_),
        pairs_of_keys_(S_ / 2, 2 * deep_),
        across_(deep_ * DEPTH, S_ / DEPTH),
        low_(1, T_ / TILE),
        high_(1, T_ / TILE),
        sights_(T_ / BLOCK) {}

  void forward(int64_t unit) {
    choose(unit);
    pair_rows(v_, pairs_of_keys_);
    turn(pairs_of_keys_, across_);
    Matrix q(BLOCK, deep_), turned_q(deep_ * TILE, LANES), out(deep_ * DEPTH, LANES);
    Matrix scores(PANEL, LANES), weights(PANEL / 2, LANES), y(BLOCK, 2 * deep_);
    for (int64_t r = 0; r < p_.heads / p_.groups; ++r)
      for (int64_t start = 0; start < p_.length; start += BLOCK) {
        const int64_t h = head(r), size = std::min(BLOCK, p_.length - start);
        read(p_.q, h, start, size, q);
        turn(q, turned_q);
        const Sight& sight = sights_[start / BLOCK];
        const int64_t first = sight.first / BLOCK * BLOCK, end = whole_blocks(sight.end);
        Sums sums;
        out.clear(0, out.rows());
        for (int64_t k = first; k < end; k += PANEL) {
          const int64_t keys = std::min(PANEL, end - k);
          product(multiplier_, {{k_.from(k), turned_q, 0, deep_}}, scores, 0, keys / TILE, 0, LANES);
          soften(start, k, keys, scores, sums, weights, out);
          product(multiplier_, {{across_.from(0, k / DEPTH), weights, 0, keys / DEPTH}}, out, 0, tiles_,
                  0, LANES, true);
        }
        finish(h, start, size, sums, out, y);
      }
  }

  void backward(int64_t unit) {
    choose(unit);
    pair_rows(k_, pairs_of_keys_);
    turn(pairs_of_keys_, across_);
    Queries q(T_, deep_), g(T_, deep_);
    Matrix dk(S_, 2 * deep_), dv(S_, 2 * deep_);
    Matrix across_dq(deep_ * DEPTH, T_ / TILE), dq(T_, 2 * deep_);
    Matrix scores(BLOCK, PANEL / TILE), slopes(BLOCK, PANEL / TILE);
    Matrix weights(BLOCK, PANEL / DEPTH), d_scores(BLOCK, PANEL / DEPTH);
    Matrix pairs(BLOCK / 2, PANEL / TILE), log_sums(1, T_ / TILE), means(1, T_ / TILE);
    for (int64_t r = 0; r < p_.heads / p_.groups; ++r) {
      const int64_t h = head(r);
      read_queries(p_.q, h, q);
      read_queries(p_.grad_y, h, g);
      read_sums(h, log_sums.sums(0), means.sums(0));
      across_dq.clear(0, across_dq.rows());
      for (int64_t k = 0; k < p_.keys; k += BLOCK) {
        const auto [first, end] = readers(k);
        for (int64_t t = first; t < end; t += PANEL) {
          const int64_t queries = std::min(PANEL, end - t), columns = queries / TILE;
          const int64_t at = t / TILE, steps = queries / DEPTH;
          product(multiplier_, {{k_.from(k), q.turned.from(0, at), 0, deep_}}, scores, 0, BLOCK / TILE,
                  0, columns);
          product(multiplier_, {{v_.from(k), g.turned.from(0, at), 0, deep_}}, slopes, 0, BLOCK / TILE,
                  0, columns);
          for (int64_t i = 0; i < queries; i += BLOCK)
            differentiate(k, t + i, scores.into(0, i / TILE), slopes.from(0, i / TILE),
                          log_sums.from(0, (t + i) / TILE), means.from(0, (t + i) / TILE),
                          weights.into(0, i / DEPTH), d_scores.into(0, i / DEPTH));
          product(multiplier_, {{weights, g.pairs.from(t / 2), 0, steps}}, dv.into(k), 0, BLOCK / TILE, 0,
                  tiles_, true);
          product(multiplier_, {{d_scores, q.pairs.from(t / 2), 0, steps}}, dk.into(k), 0, BLOCK / TILE,
                  0, tiles_, true);
          pair_rows(d_scores, pairs);
          product(multiplier_, {{across_.from(0, k / DEPTH), pairs, 0, BLOCK / DEPTH}},
                  across_dq.into(0, at), 0, tiles_, 0, columns, true);
        }
      }
      turn(across_dq, dq);
      store(dq, p_.length, p_.dq, h, 0, p_.scale);
    }
    store(dk, p_.keys, p_.dk, g_, 0, p_.scale);
    store(dv, p_.keys, p_.dv, g_, 0);
  }

 private:
  // Of a block's queries, over the keys so far.
  struct Sums {
    Vec<float> most[LANES], total[LANES];
    Sums() {
      std::fill_n(most, LANES, all<Vec<float>>(-INFINITE));
      std::fill_n(total, LANES, Vec<float>{});
    }
  };

  // All queries of a head, or the gradients of their outputs, laid out for the tiles.
  struct Queries {
    Matrix rows, turned, pairs;
    Queries(int64_t T, int64_t deep)
        : rows(T, deep), turned(deep * TILE, T / TILE), pairs(T / 2, 2 * deep) {}
  };

  int64_t head(int64_t r) const { return g_ * (p_.heads / p_.groups) + r; }
  bool there(int64_t key) const {
    return key < p_.keys && (!p_.there || p_.there[b_ * p_.keys + key]);
  }

  // The sequence and its keys; what is not there may be anything, and is zero here.
  void choose(int64_t unit) {
    b_ = unit / p_.groups;
    g_ = unit % p_.groups;
    read(p_.k, g_, 0, p_.keys, k_);
    read(p_.v, g_, 0, p_.keys, v_);
    for (int64_t i = 0; i < p_.keys; ++i)
      if (!there(i)) {
        k_.clear(i, i + 1);
        v_.clear(i, i + 1);
      }
    int32_t* low = reinterpret_cast<int32_t*>(low_.row(0));
    int32_t* high = reinterpret_cast<int32_t*>(high_.row(0));
    for (int64_t t = 0; t < T_; t += BLOCK) {
      Sight& sight = sights_[t / BLOCK] = Sight();
      for (int64_t i = t; i < t + BLOCK; ++i) {
        const bool real = i < p_.length;
        low[i] = real ? p_.low[b_ * p_.length + i] : 0;
        high[i] = real ? p_.high[b_ * p_.length + i] : 0;
        sight.all_first = std::max<int64_t>(sight.all_first, low[i]);
        sight.all_end = std::min<int64_t>(sight.all_end, high[i]);
        if (low[i] >= high[i]) continue;
        sight.first = std::min<int64_t>(sight.first, low[i]);
        sight.end = std::max<int64_t>(sight.end, high[i]);
      }
    }
  }

  bf16* address(const Tokens& x, int64_t h, int64_t i) const {
    return static_cast<bf16*>(x.data) + b_ * x.batch + i * x.time + h * p_.width;
  }
  void read(const Tokens& x, int64_t h, int64_t start, int64_t size, Matrix& to) const {
    for (int64_t i = 0; i < size; ++i) std::copy_n(address(x, h, start + i), p_.width, to.numbers(i));
    to.clear(size, to.rows());
  }
  void read_queries(const Tokens& x, int64_t h, Queries& to) const {
    read(x, h, 0, p_.length, to.rows);
    turn(to.rows, to.turned);
    pair_rows(to.rows, to.pairs);
  }
  void store(const Matrix& from, int64_t size, const Tokens& to, int64_t h, int64_t start,
             float scale = 1) const {
    for (int64_t i = 0; i < size; ++i)
      store_row<float>(from.row(i), p_.width, address(to, h, start + i), scale);
  }

  // Whether each of a block's queries sees each of a block's keys.
  bool all_seen(int64_t query, int64_t key) const {
    const Sight& sight = sights_[query / BLOCK];
    return !p_.there && sight.all_first <= key && key + BLOCK <= sight.all_end;
  }
  // Of LANES vectors of queries, those that see the key; `other` elsewhere.
  void mask(int64_t query, int64_t key, Vec<float>* x, float other) const {
    const Vec<float> none = all<Vec<float>>(other);
    const Int *low = reinterpret_cast<const Int*>(low_.row(0) + query / TILE),
              *high = reinterpret_cast<const Int*>(high_.row(0) + query / TILE);
    const Int at = Int{} + static_cast<int32_t>(there(key) ? key : -1);
    for (int v = 0; v < LANES; ++v) x[v] = ((low[v] <= at) & (at < high[v])) ? x[v] : none;
  }

  // From scores to weights exp(score - largest) as pairs, and what changes for the sums of before.
  void soften(int64_t query, int64_t key, int64_t keys, Matrix& scores, Sums& sums, Matrix& weights,
              Matrix& out) const {
    const float scale = p_.scale;
    Vec<float> most[LANES], before[LANES], total[LANES] = {};
    std::copy_n(sums.most, LANES, most);
    for (int64_t block = 0; block < keys; block += BLOCK) {
      const bool seen = all_seen(query, key + block);
      for (int64_t i = block; i < block + BLOCK; ++i) {
        Vec<float>* x = scores.row(i);
        for (int v = 0; v < LANES; ++v) x[v] *= scale;
        if (!seen) mask(query, key + i, x, -INFINITE);
        for (int v = 0; v < LANES; ++v) most[v] = x[v] > most[v] ? x[v] : most[v];
      }
    }
    Vec<float> least[LANES];  // to subtract: a query that has seen nothing yet has no largest score
    for (int v = 0; v < LANES; ++v) {
      least[v] = most[v] == all<Vec<float>>(-INFINITE) ? Vec<float>{} : most[v];
      before[v] = sums.most[v] - least[v];
    }
    exp_all<LANES>(before);
    for (int64_t i = 0; i < keys; i += 2) {
      Vec<float>*first = scores.row(i), *second = scores.row(i + 1), *pair = weights.row(i / 2);
      for (int v = 0; v < LANES; ++v) first[v] -= least[v];
      for (int v = 0; v < LANES; ++v) second[v] -= least[v];
      exp_all<LANES>(first);
      exp_all<LANES>(second);
      for (int v = 0; v < LANES; ++v) {
        total[v] += first[v] + second[v];
        pair[v] = paired(first[v], second[v]);
      }
    }
    for (int v = 0; v < LANES; ++v) {
      sums.most[v] = most[v];
      sums.total[v] = sums.total[v] * before[v] + total[v];
    }
    for (int64_t j = 0; j < tiles_ * TILE; ++j)
      for (int v = 0; v < LANES; ++v) out.row(j)[v] *= before[v];
  }

  // Outputs of a block's queries, and the logs of their sums.
  void finish(int64_t h, int64_t start, int64_t size, const Sums& sums, Matrix& out, Matrix& y) const {
    Vec<float> share[LANES];
    for (int v = 0; v < LANES; ++v) {
      const Vec<float> none{};
      share[v] = sums.total[v] > none ? 1 / sums.total[v] : none;
      for (int i = 0; i < WIDTH<float>; ++i) {
        const int64_t at = v * WIDTH<float> + i;
        const float total = sums.total[v][i];
        if (at < size)
          p_.log_sums[(b_ * p_.heads + h) * p_.length + start + at] =
              total > 0 ? sums.most[v][i] + std::log(total) : 0;
      }
    }
    for (int64_t j = 0; j < tiles_ * TILE; ++j)
      for (int v = 0; v < LANES; ++v) out.row(j)[v] *= share[v];
    turn(out, y);
    store(y, size, p_.y, h, start);
  }

  // Of every query the log of its sum, and dy.y - dl; no weight is left where there is no query.
  void read_sums(int64_t h, float* log_sums, float* means) const {
    const int64_t vectors = vectors_of<float>(p_.width), row = (b_ * p_.heads + h) * p_.length;
    Matrix room(2, vectors);
    for (int64_t i = 0; i < p_.length; ++i) {
      load_row<float>(address(p_.grad_y, h, i), p_.width, room.row(0));
      load_row<float>(address(p_.y, h, i), p_.width, room.row(1));
      log_sums[i] = p_.log_sums[row + i];
      means[i] = inner_product<float>(room.row(0), room.row(1), vectors);
      if (p_.grad_log_sums) means[i] -= p_.grad_log_sums[row + i];
    }
    std::fill(log_sums + p_.length, log_sums + T_, INFINITE);
    std::fill(means + p_.length, means + T_, 0.f);
  }

  // The run of blocks of queries that see one of a block's keys.
  std::pair<int64_t, int64_t> readers(int64_t key) const {
    const auto sees = [key](const Sight& s) { return s.first < key + BLOCK && key < s.end; };
    const auto first = std::find_if(sights_.begin(), sights_.end(), sees);
    auto last = sights_.end();
    while (last != first && !sees(last[-1])) --last;
    return {(first - sights_.begin()) * BLOCK, (last - sights_.begin()) * BLOCK};
  }

  // Weights and the gradients of scores, of a block of keys and one of queries.
  void differentiate(int64_t key, int64_t query, Target scores, Source slopes, Source log_sums,
                     Source means, Target weights, Target d_scores) const {
    const bool seen = all_seen(query, key);
    const float scale = p_.scale;
    const Vec<float>*log_sum = log_sums.row(0), *mean = means.row(0);
    for (int64_t i = 0; i < BLOCK; ++i) {
      Vec<float> x[LANES], d[LANES];
      for (int v = 0; v < LANES; ++v) x[v] = scores.row(i)[v] * scale - log_sum[v];
      exp_all<LANES>(x);
      if (!seen) mask(query, key + i, x, 0);
      for (int v = 0; v < LANES; ++v) d[v] = x[v] * (slopes.row(i)[v] - mean[v]);
      Whole *weight = reinterpret_cast<Whole*>(weights.row(i)),
            *d_score = reinterpret_cast<Whole*>(d_scores.row(i));
      for (int v = 0; v < LANES; v += 2) {
        weight[v / 2] = narrow(x[v], x[v + 1]);
        d_score[v / 2] = narrow(d[v], d[v + 1]);
      }
    }
  }

  const Problem& p_;
  const Multiplier& multiplier_;
  const int64_t T_, S_;          // queries and keys in whole blocks
  const int64_t deep_, tiles_;   // of the width: steps of depth, tiles
  Matrix k_, v_, pairs_of_keys_, across_;  // across_: the transpose of v, or of k in backward
  Matrix low_, high_;            // integers
  std::vector<Sight> sights_;
  int64_t b_ = 0, g_ = 0;
};

template <class Work>
void all_units(const Problem& p, Work work) {
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    const Multiplier multiplier;
    Unit unit(p, multiplier);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < p.batch * p.groups; ++i) work(unit, i);
  }
}

}  // namespace

extern "C" void forward(const Problem* p) {
  all_units(*p, [](Unit& unit, int64_t i) { unit.forward(i); });
}

extern "C" void backward(const Problem* p) {
  all_units(*p, [](Unit& unit, int64_t i) { unit.backward(i); });
}
