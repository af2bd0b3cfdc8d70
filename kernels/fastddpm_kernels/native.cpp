// group_norm_silu on CPUs: y = dropout(silu(FiLM(group_norm(cat(x + add + residual, skip))))) and its gradients.
// Compiled and called by native.py. Plain C++ with the vector extension of GCC and Clang: no headers of torch, no
// intrinsics and no OpenMP pragmas (threads come from the OpenMP library that torch has loaded, see `parallel`).
//
// Images are [N, H, W, C] in memory, bfloat16 or float32; all arithmetic is float32, sums over pixels and channels are
// joined in double. One task is a sample and a bundle of whole groups, so nothing depends on the other samples. Within
// a task each channel has a lane of its own from load to store, so nothing depends on the bundles or the threads.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "halves of words are addressed as on little-endian CPUs"
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int UNIT = 2 * LANES;  // channels that are loaded and stored together, as two vectors
constexpr int ROWS = 64;         // pixels whose sums are kept in float32
constexpr int MIN_BUNDLE = 64;   // channels: narrower pieces of a pixel waste cache lines

typedef float f32 __attribute__((vector_size(4 * LANES)));
typedef int32_t i32 __attribute__((vector_size(4 * LANES)));
typedef uint32_t u32 __attribute__((vector_size(4 * LANES)));
typedef uint64_t u64 __attribute__((vector_size(4 * LANES)));

struct bf16 {
  uint16_t bits;
};

}  // namespace

extern "C" {

// Mirrored field by field by `_Args` of native.py. Null pointers stand for absent arguments.
struct Args {
  int64_t num_samples, num_pixels, channels_x, channels_skip, num_groups, num_threads;
  int64_t is_bf16, silu, threshold;
  uint64_t tag, seed;
  double eps;
  const void *x, *residual, *skip, *dy, *dtotal;  // in the backward x is the total where there was a residual
  void *y, *total, *dx, *dskip;
  const float *add, *weight, *bias, *scale, *shift;  // add [N, C1], scale and shift [N, C]
  const int64_t* ordinals;
  float *mean, *rstd;                  // [N, G], written by the forward, read by the backward
  float *sum_dz, *sum_dz_xhat, *dadd;  // [N, C], [N, C], [N, C1]
  void (*gomp_parallel)(void (*)(void*), void*, unsigned, unsigned);
};
}

namespace {

template <class V>
V read(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// A unit's channels in two vectors: in order for float32; for bfloat16 the even ones and the odd ones, which are the
// lower and the upper halves of 32-bit words, so that no lane has to move. Per-channel arrays are in the same order.
struct Pair {
  f32 half[2];
};

inline Pair load(const float* p) { return {{read<f32>(p), read<f32>(p + LANES)}}; }

inline Pair load(const bf16* p) {
  u32 words = read<u32>(p);
  return {{(f32)(words << 16), (f32)(words & 0xffff0000)}};
}

inline void store(float* p, const Pair& v) { std::memcpy(p, &v, sizeof v); }

inline void store(bf16* p, const Pair& v) {
  u32 rounded[2];
  for (int h = 0; h < 2; h++) {
    u32 bits = (u32)v.half[h];
    rounded[h] = v.half[h] == v.half[h] ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;  // or a quiet NaN
  }
  u32 words = rounded[0] >> 16 | (rounded[1] & 0xffff0000);
  std::memcpy(p, &words, sizeof words);
}

// The first n channels of a unit, zeros for the others.
template <class T>
Pair load(const T* p, int n) {
  T buffer[UNIT] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}

template <class T>
void store(T* p, const Pair& v, int n) {
  T buffer[UNIT];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}

// 1 / (1 + exp(-z)) within about 3 units of the last place, exactly 0 and 1 where exp leaves the range of float32.
// exp(-z) = 2^n 2^f: 2^f by a polynomial (relative error 9e-8), 2^n by adding n to the exponent. At the bounds f = 0,
// and the bits are those of 0 and of infinity. A NaN counts as a bound: the caller's product with z brings it back.
inline f32 sigmoid(f32 z) {
  const f32 top = f32{} + 128.0f, bottom = f32{} - 127.0f;
  const f32 magic = f32{} + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to an integer, which its lowest bits hold
  f32 t = z * -1.44269504f;
  t = t < top ? t : top;
  t = t > bottom ? t : bottom;
  f32 shifted = t + magic, f = t - (shifted - magic);
  f32 p = ((f * 0.00132647273f + 0.00967151299f) * f + 0.0555073358f) * f + 0.240222424f;
  p = (p * f + 0.693147004f) * f + 1.0f;
  f32 power = (f32)((u32)p + ((u32)shifted << 23));
  return 1.0f / (1.0f + power);
}

// The products of the lower 32 bits of each lane. GCC knows no vector instruction for it and multiplies all 64 bits.
inline u64 widening_multiply(u64 a, u64 b) {
#if defined(__AVX2__)
  u64 product;
  asm("vpmuludq %2, %1, %0" : "=v"(product) : "v"(a), "v"(b));
  return product;
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// Philox4x32-10. Bit k of a counter's byte is set where its half-word k is kept.
struct Mask {
  u64 c1, c2, c3;
  uint32_t key_low, key_high;
  i32 threshold;

  void rounds(u64 (&a)[2], u64 (&b)[2], u64 (&c)[2], u64 (&d)[2]) const {
    uint32_t k0 = key_low, k1 = key_high;
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9, k1 += 0xBB67AE85)
      for (int h = 0; h < 2; h++) {  // the upper halves of the words hold rubbish that the products do not read
        u64 p0 = widening_multiply(a[h], u64{} + 0xD2511F53), p1 = widening_multiply(c[h], u64{} + 0xCD9E8D57);
        a[h] = (p1 >> 32) ^ b[h] ^ k0, c[h] = (p0 >> 32) ^ d[h] ^ k1, b[h] = p1, d[h] = p0;
      }
  }

  u32 draw(u32 counters) const {
    // The even and the odd lanes of 32 bits, each in 64.
    u64 a[2] = {(u64)counters, (u64)counters >> 32}, b[2] = {c1, c1}, c[2] = {c2, c2}, d[2] = {c3, c3};
    rounds(a, b, c, d);
    u32 bits = {};
    const u64* words[4] = {a, b, c, d};
    for (int w = 0; w < 4; w++) {
      i32 word = (i32)((words[w][0] & 0xffffffff) | words[w][1] << 32);
      bits |= (u32)((word & 0xffff) >= threshold) & (1u << 2 * w);
      bits |= (u32)((i32)((u32)word >> 16) >= threshold) & (2u << 2 * w);
    }
    return bits;
  }
};

// Channels [first, first + width) of one sample that lie in one source: x or skip.
struct Part {
  int64_t first, width, base;  // base: of its per-channel arrays, padded so that whole vectors can be read and written
  int64_t offset, stride;      // in the source, in elements: of pixel 0, from pixel to pixel
  bool is_skip;
};

struct Task {
  const Args& args;
  int64_t sample, first, width, num_channels, group_size, num_parts = 0;
  Part parts[2];
  // Per channel. Forward: the mean and the sum of squares about it; backward: the sums of dz and of dz (x - center).
  std::vector<double> sum_0, sum_1;
  // z = (x - center) slope + offset; forward: k_0 = add, backward: dx = slope dz - k_1 (x - center) - k_0.
  std::vector<float> center, slope, offset, k_0, k_1;
  std::vector<uint8_t> mask;
  int64_t mask_stride = 0;
  float keep_scale = 1.0f;
  u32 lane_bits[2];  // which bit of a unit's 32 belongs to a lane

  Task(const Args& args, int64_t sample, int64_t first, int64_t width)
      : args(args), sample(sample), first(first), width(width), num_channels(args.channels_x + args.channels_skip),
        group_size(num_channels / args.num_groups) {
    int64_t base = 0, middle = args.channels_x, end = first + width;
    auto part = [&](int64_t from, int64_t to, int64_t start, int64_t channels) {
      if (from >= to) return;
      int64_t offset = sample * args.num_pixels * channels + from - start;
      parts[num_parts++] = {from, to - from, base, offset, channels, start > 0};
      base += (to - from + UNIT - 1) / UNIT * UNIT;
    };
    part(first, end < middle ? end : middle, 0, args.channels_x);
    part(first > middle ? first : middle, end, middle, args.channels_skip);
    for (auto* sums : {&sum_0, &sum_1}) sums->assign(base, 0.0);
    for (auto* constants : {&center, &slope, &offset, &k_0, &k_1}) constants->assign(base, 0.0f);
    for (int k = 0; k < UNIT; k++) lane_bits[place(k) / LANES][place(k) % LANES] = 1u << k;
    if (args.threshold) draw_mask();
  }

  // One bit per element of the bundle, a row of bytes per pixel; a counter is 8 neighbours among the whole sample's.
  void draw_mask() {
    mask_stride = (width + 7) / 8 + (num_channels % 8 || first % 8 ? 1 : 0);
    keep_scale = 65536.0f / (65536 - args.threshold);
    uint64_t ordinal = args.ordinals[sample];
    Mask drawn = {u64{} + (uint32_t)ordinal, u64{} + (ordinal >> 32), u64{} + args.tag,
                  (uint32_t)args.seed, (uint32_t)(args.seed >> 32), i32{} + (int32_t)args.threshold};
    int64_t num_bytes = args.num_pixels * mask_stride, pixel = 0, column = 0;
    uint32_t start = first / 8;
    mask.resize(num_bytes + 4 * LANES);  // whole vectors are written, and 8 bytes read at any one
    for (int64_t i = 0; i < num_bytes; i += 4 * LANES) {
      uint32_t counters[4][LANES];
      for (int lane = 0; lane < LANES; lane++)
        for (int k = 0; k < 4; k++) {
          counters[k][lane] = start + column;
          if (++column == mask_stride) column = 0, start = (++pixel * num_channels + first) / 8;
        }
      u32 bytes = {};
      for (int k = 0; k < 4; k++) bytes |= drawn.draw(read<u32>(counters[k])) << 8 * k;
      std::memcpy(&mask[i], &bytes, sizeof bytes);
    }
  }

  // The bits of the unit that begins at a channel.
  uint32_t kept(uint64_t pixel, uint64_t channel) const {
    uint64_t bit = (pixel * num_channels + first) % 8 + channel - first;
    return read<uint64_t>(&mask[pixel * mask_stride + bit / 8]) >> bit % 8;
  }

  // Where the per-channel arrays have channel k of a unit, see `Pair`.
  int place(int k) const { return args.is_bf16 ? k % 2 * LANES + k / 2 : k; }

  template <class F>
  void per_channel(F f) {  // f(absolute channel, index of its per-channel arrays)
    for (int64_t i = 0; i < num_parts; i++)
      for (int64_t c = 0; c < parts[i].width; c++)
        f(parts[i].first + c, parts[i].base + c / UNIT * UNIT + place(c % UNIT));
  }

  // What is still to be added to x: a total has it already.
  double added(int64_t channel) const {
    bool to_add = args.add && !args.residual && channel < args.channels_x;
    return to_add ? args.add[sample * args.channels_x + channel] : 0.0;
  }

  template <class F>
  void per_group(F f) {  // f(group, indices of its channels, their absolute numbers)
    std::vector<int64_t> index(width);
    per_channel([&](int64_t channel, int64_t i) { index[channel - first] = i; });
    for (int64_t g = 0; g < width; g += group_size) f((first + g) / group_size, &index[g], first + g);
  }
};

// Channels [c, c + N UNIT) of a part, or, with N = 0, the last ones, fewer than a unit.
template <int N>
struct Block {
  static constexpr int UNITS = N ? N : 1;
  const Part& part;
  int64_t c;
  int lanes;

  int64_t channel() const { return part.first + c; }
  int64_t base() const { return part.base + c; }

  template <class T>
  Pair get(const T* p) const {
    return N ? load(p) : load(p, lanes);
  }
  template <class T>
  void put(T* p, const Pair& v) const {
    N ? store(p, v) : store(p, v, lanes);
  }
};

// Calls f(block, first row, rows) over the image: blocks of two units, whose sums stay in registers, then smaller ones.
template <class F>
void per_block(const Task& task, F f) {
  for (int64_t row = 0; row < task.args.num_pixels; row += ROWS) {
    int rows = task.args.num_pixels - row < ROWS ? task.args.num_pixels - row : ROWS;
    for (int64_t i = 0; i < task.num_parts; i++) {
      const Part& part = task.parts[i];
      int64_t c = 0;
      for (; c + 2 * UNIT <= part.width; c += 2 * UNIT) f(Block<2>{part, c, UNIT}, row, rows);
      if (c + UNIT <= part.width) f(Block<1>{part, c, UNIT}, row, rows), c += UNIT;
      if (c < part.width) f(Block<0>{part, c, (int)(part.width - c)}, row, rows);
    }
  }
}

// Per-channel constants of a block.
template <int N>
struct Constants {
  Pair unit[Block<N>::UNITS];
  Constants(const std::vector<float>& values, const Block<N>& block) {
    std::memcpy(unit, &values[block.base()], sizeof unit);
  }
};

inline double lane(const Pair* units, int k) { return units[k / UNIT].half[k % UNIT / LANES][k % LANES]; }

template <int N>
void accumulate(std::vector<double>& sums, const Block<N>& block, const Pair* units) {
  for (int k = 0; k < Block<N>::UNITS * UNIT; k++) sums[block.base() + k] += lane(units, k);
}

// Sums of up to ROWS pixels about a pivot, the mean of every 8th: (pivot - mean)^2 <= 8 variances, whatever the values,
// so that few bits cancel in sum d^2 - (sum d)^2 / n. Blocks are joined as Chan et al. do.
template <class T, int N>
void moments(Task& task, const Block<N>& block, int64_t row, int rows) {
  constexpr int V = Block<N>::UNITS;
  const Args& args = task.args;
  const Part& part = block.part;
  int64_t at = part.offset + row * part.stride + block.c;
  const T* x = (const T*)(part.is_skip ? args.skip : args.x) + at;
  const T* residual = part.is_skip || !args.residual ? nullptr : (const T*)args.residual + at;
  T* total = residual ? (T*)args.total + at : nullptr;
  const Constants<N> add(task.k_0, block);
  auto value = [&](int r, int j) {
    int64_t i = r * part.stride + j * UNIT;
    Pair v = block.get(x + i);
    if (!residual) return v;
    Pair other = block.get(residual + i);
    for (int h = 0; h < 2; h++) v.half[h] = v.half[h] + add.unit[j].half[h] + other.half[h];
    block.put(total + i, v);
    return block.get(total + i);
  };
  Pair pivot[V] = {}, sum[V] = {}, squares[V] = {};
  for (int r = 0; r < rows; r += 8)
    for (int j = 0; j < V; j++) {
      Pair v = value(r, j);
      for (int h = 0; h < 2; h++) pivot[j].half[h] += v.half[h] * (1.0f / ((rows + 7) / 8));
    }
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) {
      Pair v = value(r, j);
      for (int h = 0; h < 2; h++) {
        f32 d = v.half[h] - pivot[j].half[h];
        sum[j].half[h] += d;
        squares[j].half[h] += d * d;
      }
    }
  double before = row, after = row + rows, n = rows;
  for (int k = 0; k < V * UNIT; k++) {
    double &mean = task.sum_0[block.base() + k], &m2 = task.sum_1[block.base() + k];
    double s = lane(sum, k), delta = lane(pivot, k) + s / n - mean;
    mean += delta * (n / after);
    m2 += lane(squares, k) - s * s / n + delta * delta * (before * n / after);
  }
}

void film(Task& task, int64_t channel, int64_t i, double mean, double rstd) {
  const Args& args = task.args;
  int64_t at = task.sample * task.num_channels + channel;
  double gain = args.scale ? 1.0 + args.scale[at] : 1.0;
  double center = mean - task.added(channel);
  task.center[i] = center;
  task.slope[i] = rstd * args.weight[channel] * gain;
  // What rounding the center leaves out.
  double lost = (task.center[i] - center) * task.slope[i];
  task.offset[i] = args.bias[channel] * gain + (args.shift ? args.shift[at] : 0.0) + lost;
}

template <class T, int N>
void apply(Task& task, const Block<N>& block, int64_t row, int rows) {
  const Args& args = task.args;
  const Part& part = block.part;
  const int64_t C = task.num_channels;
  const void* source = part.is_skip ? args.skip : args.residual ? args.total : args.x;
  const T* x = (const T*)source + part.offset + row * part.stride + block.c;
  T* y = (T*)args.y + (task.sample * args.num_pixels + row) * C + block.channel();
  const Constants<N> center(task.center, block), slope(task.slope, block), offset(task.offset, block);
  const u32* lane_bits = task.lane_bits;
  const bool silu = args.silu, dropout = args.threshold;
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < Block<N>::UNITS; j++) {
      Pair v = block.get(x + r * part.stride + j * UNIT);
      u32 bits = u32{} + (dropout ? task.kept(row + r, block.channel() + j * UNIT) : 0);
      for (int h = 0; h < 2; h++) {
        f32 z = (v.half[h] - center.unit[j].half[h]) * slope.unit[j].half[h] + offset.unit[j].half[h];
        if (silu) z = z * sigmoid(z);
        if (dropout) z = (bits & lane_bits[h]) != 0 ? z * task.keep_scale : f32{};
        v.half[h] = z;
      }
      block.put(y + r * C + j * UNIT, v);
    }
}

// Walks the gradient dz at FiLM's output beside x less its center: f(pixel, unit, dz, centered) with two Pairs.
template <class T, int N, class F>
inline void per_gradient(const Task& task, const Block<N>& block, int64_t row, int rows, F f) {
  const Args& args = task.args;
  const Part& part = block.part;
  const int64_t C = task.num_channels;
  const T* x = (const T*)(part.is_skip ? args.skip : args.x) + part.offset + row * part.stride + block.c;
  const T* dy = (const T*)args.dy + (task.sample * args.num_pixels + row) * C + block.channel();
  const Constants<N> center(task.center, block), slope(task.slope, block), offset(task.offset, block);
  const u32* lane_bits = task.lane_bits;
  const bool silu = args.silu, dropout = args.threshold;
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < Block<N>::UNITS; j++) {
      Pair centered = block.get(x + r * part.stride + j * UNIT), dz = block.get(dy + r * C + j * UNIT);
      u32 bits = u32{} + (dropout ? task.kept(row + r, block.channel() + j * UNIT) : 0);
      for (int h = 0; h < 2; h++) {
        f32 d = dz.half[h], from_center = centered.half[h] - center.unit[j].half[h];
        if (dropout) d = (bits & lane_bits[h]) != 0 ? d * task.keep_scale : f32{};
        if (silu) {
          f32 z = from_center * slope.unit[j].half[h] + offset.unit[j].half[h], s = sigmoid(z), zs = z * s;
          d = d * (s + zs * (1.0f - s));
        }
        centered.half[h] = from_center, dz.half[h] = d;
      }
      f(r, j, dz, centered);
    }
}

template <class T, int N>
void sums(Task& task, const Block<N>& block, int64_t row, int rows) {
  Pair sum[Block<N>::UNITS] = {}, sum_centered[Block<N>::UNITS] = {};
  per_gradient<T>(task, block, row, rows, [&](int, int j, const Pair& dz, const Pair& centered) {
    for (int h = 0; h < 2; h++) {
      sum[j].half[h] += dz.half[h];
      sum_centered[j].half[h] += dz.half[h] * centered.half[h];
    }
  });
  accumulate(task.sum_0, block, sum);
  accumulate(task.sum_1, block, sum_centered);
}

template <class T, int N>
void input_gradient(Task& task, const Block<N>& block, int64_t row, int rows) {
  const Args& args = task.args;
  const Part& part = block.part;
  int64_t at = part.offset + row * part.stride + block.c;
  const T* dtotal = part.is_skip || !args.dtotal ? nullptr : (const T*)args.dtotal + at;
  T* dx = (T*)(part.is_skip ? args.dskip : args.dx) + at;
  const Constants<N> slope(task.slope, block), k_0(task.k_0, block), k_1(task.k_1, block);
  Pair sum[Block<N>::UNITS] = {};
  per_gradient<T>(task, block, row, rows, [&](int r, int j, const Pair& dz, const Pair& centered) {
    Pair v;
    for (int h = 0; h < 2; h++) {
      f32 mean_part = centered.half[h] * k_1.unit[j].half[h] + k_0.unit[j].half[h];
      v.half[h] = dz.half[h] * slope.unit[j].half[h] - mean_part;
    }
    if (dtotal) {
      Pair other = block.get(dtotal + r * part.stride + j * UNIT);
      for (int h = 0; h < 2; h++) v.half[h] += other.half[h];
    }
    for (int h = 0; h < 2; h++) sum[j].half[h] += v.half[h];
    block.put(dx + r * part.stride + j * UNIT, v);
  });
  accumulate(task.sum_0, block, sum);
}

template <class T>
void forward(Task& task) {
  const Args& args = task.args;
  if (args.residual && args.add)
    task.per_channel([&](int64_t channel, int64_t i) {
      if (channel < args.channels_x) task.k_0[i] = args.add[task.sample * args.channels_x + channel];
    });
  per_block(task, [&](const auto& block, int64_t row, int rows) { moments<T>(task, block, row, rows); });
  task.per_group([&](int64_t group, const int64_t* index, int64_t channel) {
    double mean = 0.0, m2 = 0.0;
    auto mean_of = [&](int64_t k) { return task.sum_0[index[k]] + task.added(channel + k); };
    for (int64_t k = 0; k < task.group_size; k++) mean += mean_of(k) / task.group_size;
    for (int64_t k = 0; k < task.group_size; k++)
      m2 += task.sum_1[index[k]] + args.num_pixels * (mean_of(k) - mean) * (mean_of(k) - mean);
    double rstd = 1.0 / std::sqrt(m2 / (args.num_pixels * task.group_size) + args.eps);
    args.mean[task.sample * args.num_groups + group] = mean;
    args.rstd[task.sample * args.num_groups + group] = rstd;
    for (int64_t k = 0; k < task.group_size; k++) film(task, channel + k, index[k], mean, rstd);
  });
  per_block(task, [&](const auto& block, int64_t row, int rows) { apply<T>(task, block, row, rows); });
}

template <class T>
void backward(Task& task) {
  const Args& args = task.args;
  auto statistic = [&](const float* p, int64_t group) -> double { return p[task.sample * args.num_groups + group]; };
  task.per_group([&](int64_t group, const int64_t* index, int64_t channel) {
    for (int64_t k = 0; k < task.group_size; k++)
      film(task, channel + k, index[k], statistic(args.mean, group), statistic(args.rstd, group));
  });
  per_block(task, [&](const auto& block, int64_t row, int rows) { sums<T>(task, block, row, rows); });
  task.per_group([&](int64_t group, const int64_t* index, int64_t channel) {
    double rstd = statistic(args.rstd, group), mean_d = 0.0, mean_d_xhat = 0.0;  // of the gradient at xhat
    int64_t size = task.group_size * args.num_pixels, at = task.sample * task.num_channels + channel;
    for (int64_t k = 0; k < task.group_size; k++) {
      int64_t i = index[k];
      double gain = args.weight[channel + k] * (args.scale ? 1.0 + args.scale[at + k] : 1.0);
      task.sum_1[i] *= rstd;
      args.sum_dz[at + k] = task.sum_0[i];
      args.sum_dz_xhat[at + k] = task.sum_1[i];
      mean_d += gain * task.sum_0[i] / size;
      mean_d_xhat += gain * task.sum_1[i] / size;
    }
    for (int64_t k = 0; k < task.group_size; k++) {
      task.k_0[index[k]] = rstd * mean_d;
      task.k_1[index[k]] = rstd * rstd * mean_d_xhat;
    }
  });
  task.sum_0.assign(task.sum_0.size(), 0.0);
  per_block(task, [&](const auto& block, int64_t row, int rows) { input_gradient<T>(task, block, row, rows); });
  task.per_channel([&](int64_t channel, int64_t i) {
    if (channel < args.channels_x) args.dadd[task.sample * args.channels_x + channel] = task.sum_0[i];
  });
}

struct Region {
  const Args& args;
  void (*function)(Task&);
  int64_t width, num_bundles;
  std::atomic<int64_t> next{0};

  static void run(void* region) {
    Region& self = *(Region*)region;
    int64_t channels = self.args.channels_x + self.args.channels_skip, i;
    while ((i = self.next++) < self.args.num_samples * self.num_bundles) {
      int64_t first = i % self.num_bundles * self.width, left = channels - first;
      Task task(self.args, i / self.num_bundles, first, left < self.width ? left : self.width);
      self.function(task);
    }
  }
};

// Whole samples where they keep the threads busy, else bundles of groups that end at whole vectors where they can.
void parallel(const Args& args, void (*function)(Task&)) {
  int64_t channels = args.channels_x + args.channels_skip, group_size = channels / args.num_groups, unit = group_size;
  while (unit % LANES && unit < channels) unit += group_size;
  int64_t wanted = (4 * args.num_threads + args.num_samples - 1) / args.num_samples;  // bundles per sample
  int64_t width = (channels + wanted - 1) / wanted;
  if (width < MIN_BUNDLE) width = MIN_BUNDLE;
  if (args.num_threads == 1 || wanted <= 1) width = channels;
  width = (width + unit - 1) / unit * unit;
  Region region{args, function, width, (channels + width - 1) / width};
  if (args.num_threads > 1 && args.gomp_parallel)
    args.gomp_parallel(Region::run, &region, args.num_threads, 0);
  else
    Region::run(&region);
}

}  // namespace

extern "C" void group_norm_silu_forward(const Args* args) {
  parallel(*args, args->is_bf16 ? forward<bf16> : forward<float>);
}

extern "C" void group_norm_silu_backward(const Args* args) {
  parallel(*args, args->is_bf16 ? backward<bf16> : backward<float>);
}
