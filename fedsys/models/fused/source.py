"""The kernels in C, as text: so they travel wherever Python does, also in Flower's bundle.

Flower bundles files of a few kinds only, and C is none of them. `fedsys.models.fused.building`
makes a library of it, `fedsys.models.fused.unit` calls its two functions.
"""

SOURCE = r"""
// A convolution, its normalisation, ReLU and max pooling in one pass over the images, and the
// gradients of all parameters from the gradient of the pooled outputs.
//
// Nothing is written at the size of the convolution's outputs. A patch p is what the kernel sees
// at a position, K = kernel height x width x channels numbers in that order, and z = w . p. So the
// mean of z over positions is w . S / count with S the sum of the patches, its second moment
// w . G w / count with G the K x K Gram matrix of the patches, and each sum over positions that
// normalisation needs in backward is linear in S, G and A = sum of d p, where d is the gradient at
// the positions that the pooling chose. Where statistics are taken, patches are of inputs less a
// `shift` for each channel, near its mean: else small variances would be differences of large
// numbers. Images are worked through in at most CHUNKS parts whose sums are added up in order, so
// that the number of threads changes no bit.

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 8
#elif defined(__AVX2__)
#define LANES 8
#define ROWS 6
#else
#define LANES 4
#define ROWS 3
#endif
#define BLOCK 16              // outputs that are computed together
#define PARTS (BLOCK / LANES) // vectors of them
#define TILE 8                // vectors of a patch that are summed up together
#define CHUNKS 8
#define SPAN 256              // positions of the Gram matrix whose sums are single
#define STRIP 6144            // numbers in the patches of a strip of backward

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int8_t bvec __attribute__((vector_size(LANES), aligned(1), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define AT(p) (*(vec *)(p))
#define UNROLL _Pragma("GCC unroll 16")

enum { AFFINE, BATCH, GROUP };

typedef struct {
  int64_t images, channels, height, width;      // of the input
  int64_t x_image, x_channel, x_row, x_column;  // its strides
  int64_t outputs, kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x;
  int64_t w_output, w_channel, w_row, w_column; // strides of the weight
  int64_t conv_h, conv_w;                       // of the convolution's outputs
  int64_t pool_y, pool_x, pool_stride_y, pool_stride_x, pool_pad_y, pool_pad_x;
  int64_t out_h, out_w;
  int64_t norm, groups, threads;
  double eps, momentum, cap;                    // cap: what ReLU6 caps at, infinite for ReLU
  const float *x, *weight, *bias, *gamma, *beta; // bias, gamma, beta: or none
  float *running_mean, *running_var;            // read where AFFINE, moved where BATCH; or none
  float *out;                                   // images, out_h, out_w, outputs
  int8_t *where;                                // the like: place in the window, or -1 for none
  double *keep;                                 // what forward leaves for backward
  const float *d_out;                           // as `out`
  float *d_weight, *d_bias, *d_gamma, *d_beta;  // the first has the strides of the weight
  float *d_conv;                                // images, conv_h, conv_w, outputs; or none
} unit;

typedef struct {
  const unit *u;
  int64_t k, run, pw, ph, planes, wide, blocks, outputs, chunks;
  float *folded, *offset;    // weights by block, patch and output; what is added
  float *shift;              // by channel
  double *wt;                // weights by patch and output
  double *sums;              // a part for each chunk
  int64_t stride;            // of `sums`
  atomic_int failed;
} job;

static int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static void *room(int64_t bytes) { return aligned_alloc(64, up(bytes + 256, 64)); }

// --- threads ------------------------------------------------------------------------------------

typedef struct {
  job *j;
  void (*work)(job *, int64_t);
  atomic_long next;
} round_;

static void *help(void *arg) {
  round_ *r = arg;
  for (int64_t i; (i = atomic_fetch_add(&r->next, 1)) < r->j->chunks;) r->work(r->j, i);
  return 0;
}

static void each(job *j, void (*work)(job *, int64_t)) {
  round_ r = {j, work, 0};
  pthread_t helpers[CHUNKS];
  int64_t count = 0, wanted = least(j->u->threads, j->chunks) - 1;
  while (count < wanted && !pthread_create(&helpers[count], 0, help, &r)) count++;
  help(&r);
  for (int64_t i = 0; i < count; i++) pthread_join(helpers[i], 0);
}

static int64_t first_of(const job *j, int64_t chunk) { return j->u->images * chunk / j->chunks; }

// --- images -------------------------------------------------------------------------------------

// Numbers of a padded image and what may be read behind it.
static int64_t padded(const job *j) {
  return (j->ph * j->pw + ROWS * j->u->stride_x) * j->u->channels + 4 * LANES;
}

// Write image n with its border, less the shift: rows, columns, channels.
static void pad(const job *j, int64_t n, float *to) {
  const unit *u = j->u;
  const int64_t c = u->channels;
  for (int64_t ch = 0; ch < c; ch++) {
    const float s = j->shift[ch], *from = u->x + n * u->x_image + ch * u->x_channel;
    for (int64_t i = 0; i < j->ph * j->pw; i++) to[i * c + ch] = -s;
    for (int64_t y = 0; y < u->height; y++) {
      const float *row = from + y * u->x_row;
      float *d = to + ((y + u->pad_y) * j->pw + u->pad_x) * c + ch;
      for (int64_t x = 0; x < u->width; x++) d[x * c] = row[x * u->x_column] - s;
    }
  }
}

// The same by channel: channels, rows, columns.
static void pad_planes(const job *j, int64_t n, float *to) {
  const unit *u = j->u;
  for (int64_t ch = 0; ch < u->channels; ch++, to += j->ph * j->pw) {
    const float s = j->shift[ch], *from = u->x + n * u->x_image + ch * u->x_channel;
    for (int64_t i = 0; i < j->ph * j->pw; i++) to[i] = -s;
    for (int64_t y = 0; y < u->height; y++) {
      const float *row = from + y * u->x_row;
      float *d = to + (y + u->pad_y) * j->pw + u->pad_x;
      if (u->x_column == 1)
        for (int64_t x = 0; x < u->width; x++) d[x] = row[x] - s;
      else
        for (int64_t x = 0; x < u->width; x++) d[x] = row[x * u->x_column] - s;
    }
  }
}

// Choose the shift: the mean of each channel over a few images.
static void find_shift(job *j) {
  const unit *u = j->u;
  const int64_t step = most(1, u->images / 8);
  for (int64_t ch = 0; ch < u->channels; ch++) {
    double sum = 0, count = 0;
    for (int64_t n = 0; n < u->images; n += step)
      for (int64_t y = 0; y < u->height; y++) {
        const float *row = u->x + n * u->x_image + ch * u->x_channel + y * u->x_row;
        float part = 0;
        for (int64_t x = 0; x < u->width; x++) part += row[x * u->x_column];
        sum += part, count += u->width;
      }
    const double mean = sum / count;
    j->shift[ch] = isfinite(mean) ? (float)mean : 0;
  }
}

// --- the Gram matrix ----------------------------------------------------------------------------

INLINE double total(vec v) {
  double sum = 0;
  for (int i = 0; i < LANES; i++) sum += v[i];
  return sum;
}

// Add to G (upper half) and S what `wide` columns of patches hold: K rows of SPAN.
static void gram_span(const float *cols, int64_t k, int64_t wide, double *G, double *S) {
  for (int64_t a = 0; a < k; a++) {
    vec sum = {0};
    for (int64_t i = 0; i < wide; i += LANES) sum += AT(cols + a * SPAN + i);
    S[a] += total(sum);
  }
  for (int64_t a = 0; a < k; a += 3)
    for (int64_t b = a; b < k; b += 3) {
      const float *left[3], *right[3];
      for (int q = 0; q < 3; q++) { // beyond the end rows are read twice
        left[q] = cols + least(a + q, k - 1) * SPAN, right[q] = cols + least(b + q, k - 1) * SPAN;
      }
      vec sums[9] = {{0}};
      for (int64_t i = 0; i < wide; i += LANES) {
        const vec l0 = AT(left[0] + i), l1 = AT(left[1] + i), l2 = AT(left[2] + i);
        const vec r0 = AT(right[0] + i), r1 = AT(right[1] + i), r2 = AT(right[2] + i);
        sums[0] += l0 * r0, sums[1] += l0 * r1, sums[2] += l0 * r2;
        sums[3] += l1 * r0, sums[4] += l1 * r1, sums[5] += l1 * r2;
        sums[6] += l2 * r0, sums[7] += l2 * r1, sums[8] += l2 * r2;
      }
      for (int q = 0; q < 9; q++)
        if (a + q / 3 < k && b + q % 3 < k) G[(a + q / 3) * k + b + q % 3] += total(sums[q]);
    }
}

// Copy of one row of positions the columns from x to x + count, to place `at` of `cols`.
static void gather(const job *j, const float *planes, int64_t y, int64_t x, int64_t count,
                   int64_t at, float *cols) {
  const unit *u = j->u;
  for (int64_t v = 0, row = 0; v < u->kernel_y; v++)
    for (int64_t h = 0; h < u->kernel_x; h++)
      for (int64_t ch = 0; ch < u->channels; ch++, row++) {
        const float *from = planes + (ch * j->ph + y * u->stride_y + v) * j->pw + h;
        float *to = cols + row * SPAN + at;
        if (u->stride_x == 1)
          memcpy(to, from + x, 4 * count);
        else
          for (int64_t i = 0; i < count; i++) to[i] = from[(x + i) * u->stride_x];
      }
}

// Add to G and S the patches of image n.
static void gram(const job *j, int64_t n, float *planes, float *cols, double *G, double *S) {
  const unit *u = j->u;
  int64_t at = 0;
  pad_planes(j, n, planes);
  for (int64_t y = 0; y < u->conv_h; y++)
    for (int64_t x = 0; x < u->conv_w;) {
      const int64_t count = least(u->conv_w - x, SPAN - at);
      gather(j, planes, y, x, count, at, cols);
      at += count, x += count;
      const int last = y == u->conv_h - 1 && x == u->conv_w;
      if (at < SPAN && !last) continue;
      const int64_t wide = up(at, LANES);
      for (int64_t row = 0; row < j->k; row++)
        memset(cols + row * SPAN + at, 0, 4 * (wide - at));
      gram_span(cols, j->k, wide, G, S);
      at = 0;
    }
}

static void mirror(double *G, int64_t k) {
  for (int64_t a = 0; a < k; a++)
    for (int64_t b = 0; b < a; b++) G[a * k + b] = G[b * k + a];
}

// Q = G W, by patch and output.
static void times_weights(const job *j, const double *G, double *Q) {
  const int64_t k = j->k, o = j->outputs;
  memset(Q, 0, sizeof(double) * k * o);
  for (int64_t a = 0; a < k; a++)
    for (int64_t b = 0; b < k; b++) {
      const double g = G[a * k + b], *w = j->wt + b * o;
      double *q = Q + a * o;
      for (int64_t i = 0; i < o; i++) q[i] += g * w[i];
    }
}

// --- forward ------------------------------------------------------------------------------------

// One row of the convolution for a block of outputs: conv_w (rounded up to ROWS) x BLOCK.
static void conv_row(const job *j, const float *image, int64_t y, const float *w, const float *b,
                     float *z) {
  const unit *u = j->u;
  const int64_t c = u->channels, step = u->stride_x * c, run = j->run, down = j->pw * c;
  for (int64_t x = 0; x < u->conv_w; x += ROWS) {
    vec sums[ROWS][PARTS];
    UNROLL for (int r = 0; r < ROWS; r++)
      UNROLL for (int p = 0; p < PARTS; p++) sums[r][p] = AT(b + p * LANES);
    const float *from = image + y * u->stride_y * down + x * step, *wk = w;
    for (int64_t v = 0; v < u->kernel_y; v++, from += down)
      for (int64_t e = 0; e < run; e++, wk += BLOCK) {
        vec now[PARTS];
        UNROLL for (int p = 0; p < PARTS; p++) now[p] = AT(wk + p * LANES);
        UNROLL for (int r = 0; r < ROWS; r++) {
          const float value = from[r * step + e];
          UNROLL for (int p = 0; p < PARTS; p++) sums[r][p] += value * now[p];
        }
      }
    UNROLL for (int r = 0; r < ROWS; r++)
      UNROLL for (int p = 0; p < PARTS; p++) AT(z + (x + r) * BLOCK + p * LANES) = sums[r][p];
  }
}

INLINE vec choose(ivec yes, vec a, vec b) { return (vec)(((ivec)a & yes) | ((ivec)b & ~yes)); }

// Pool a window of rows [y0, y1) and columns [x0, x1), apply ReLU, and store what fits.
INLINE void pool(const unit *u, float *const *rows, int64_t y0, int64_t y1, int64_t x0,
                 int64_t x1, int64_t skip_y, int64_t skip_x, float cap, int64_t fits, float *out,
                 int8_t *where) {
  UNROLL for (int p = 0; p < PARTS; p++) {
    vec top = AT(rows[0] + x0 * BLOCK + p * LANES);
    ivec place = (ivec){0} + (int32_t)(skip_y * u->pool_x + skip_x);
    for (int64_t y = y0; y < y1; y++)
      for (int64_t x = x0; x < x1; x++) {
        const vec value = AT(rows[y - y0] + x * BLOCK + p * LANES);
        const ivec more = (ivec)(value > top) | (ivec)(value != value); // NaN stays, as in torch
        const int32_t here = (int32_t)((skip_y + y - y0) * u->pool_x + skip_x + x - x0);
        top = choose(more, value, top);
        place = (((ivec){0} + here) & more) | (place & ~more);
      }
    const vec zero = {0}, caps = zero + cap;
    const ivec low = (ivec)(top <= zero), high = (ivec)(top >= caps);
    top = choose(high, caps, choose(low, zero, top));
    const bvec small = __builtin_convertvector(place | low | high, bvec);
    if (fits >= (p + 1) * LANES) {
      AT(out + p * LANES) = top;
      memcpy(where + p * LANES, &small, LANES);
    } else
      for (int64_t i = p * LANES; i < fits; i++)
        out[i] = top[i - p * LANES], where[i] = small[i - p * LANES];
  }
}

// All outputs of image n with the folded weights.
static void forward(const job *j, int64_t n, const float *image, const float *folded,
                    const float *offset, float *ring) {
  const unit *u = j->u;
  const float cap = (float)u->cap;
  for (int64_t block = 0; block < j->blocks; block++) {
    const float *w = folded + block * j->k * BLOCK, *b = offset + block * BLOCK;
    const int64_t fits = least(BLOCK, u->outputs - block * BLOCK);
    int64_t next = 0;
    for (int64_t i = 0; i < u->out_h; i++) {
      const int64_t from = i * u->pool_stride_y - u->pool_pad_y;
      const int64_t y0 = most(0, from), y1 = least(u->conv_h, from + u->pool_y);
      float *rows[128];
      for (int64_t y = y0; y < y1; y++) {
        rows[y - y0] = ring + y % u->pool_y * j->wide * BLOCK;
        if (y >= next) conv_row(j, image, y, w, b, rows[y - y0]);
      }
      next = most(next, y1);
      for (int64_t k = 0; k < u->out_w; k++) {
        const int64_t left = k * u->pool_stride_x - u->pool_pad_x;
        const int64_t x0 = most(0, left), x1 = least(u->conv_w, left + u->pool_x);
        const int64_t at = ((n * u->out_h + i) * u->out_w + k) * u->outputs + block * BLOCK;
        pool(u, rows, y0, y1, x0, x1, y0 - from, x0 - left, cap, fits, u->out + at, u->where + at);
      }
    }
  }
}

// Fold a scale and an offset of each output into weights and biases.
static void fold(const job *j, const double *scale, const double *offset, float *w, float *b) {
  const int64_t padded = j->blocks * BLOCK;
  for (int64_t o = 0; o < padded; o++) {
    const int there = o < j->outputs;
    b[o] = there ? (float)offset[o] : 0;
    float *to = w + o / BLOCK * j->k * BLOCK + o % BLOCK;
    for (int64_t k = 0; k < j->k; k++)
      to[k * BLOCK] = there ? (float)(scale[o] * j->wt[k * j->outputs + o]) : 0;
  }
}

static double gamma_of(const unit *u, int64_t o) { return u->gamma ? u->gamma[o] : 1; }
static double beta_of(const unit *u, int64_t o) { return u->beta ? u->beta[o] : 0; }
static double bias_of(const unit *u, int64_t o) { return u->bias ? u->bias[o] : 0; }

// What `keep` holds: BATCH: G, S, mean, 1 / deviation; GROUP: mean, 1 / deviation by image, group;
// AFFINE: mean, 1 / deviation. In front the shifts.
static double *kept_sums(const job *j) { return j->u->keep + j->u->channels; }

static void affine(job *j) {
  const unit *u = j->u;
  double *mean = kept_sums(j), *inverse = mean + j->outputs;
  double scale[j->outputs], offset[j->outputs];
  for (int64_t o = 0; o < j->outputs; o++) {
    mean[o] = u->running_mean ? u->running_mean[o] : 0;
    inverse[o] = u->running_var ? 1 / sqrt(u->running_var[o] + u->eps) : 1;
    scale[o] = gamma_of(u, o) * inverse[o];
    offset[o] = beta_of(u, o) + scale[o] * (bias_of(u, o) - mean[o]);
  }
  fold(j, scale, offset, j->folded, j->offset);
}

static void sum_grams(job *j, int64_t chunk) {
  float *planes = room(4 * j->planes), *cols = room(4 * j->k * SPAN);
  double *G = j->sums + chunk * j->stride, *S = G + j->k * j->k;
  if (planes && cols)
    for (int64_t n = first_of(j, chunk); n < first_of(j, chunk + 1); n++)
      gram(j, n, planes, cols, G, S);
  else
    j->failed = 1;
  free(planes), free(cols);
}

// Add the sums of the chunks up, in order.
static void reduce(const job *j, double *to, int64_t count) {
  memset(to, 0, sizeof(double) * count);
  for (int64_t c = 0; c < j->chunks; c++)
    for (int64_t i = 0; i < count; i++) to[i] += j->sums[c * j->stride + i];
}

static int batch(job *j) {
  const unit *u = j->u;
  const int64_t k = j->k, outputs = j->outputs;
  const double count = (double)(u->images * u->conv_h * u->conv_w);
  double *G = kept_sums(j), *S = G + k * k, *mean = S + k, *inverse = mean + outputs;
  double *Q = room(sizeof(double) * k * outputs);
  if (!Q) return 1;
  each(j, sum_grams);
  reduce(j, G, k * k + k);
  mirror(G, k);
  times_weights(j, G, Q);
  double scale[outputs], offset[outputs];
  for (int64_t o = 0; o < outputs; o++) {
    double sum = 0, squares = 0, shifted = bias_of(u, o);
    for (int64_t a = 0; a < k; a++) {
      const double w = j->wt[a * outputs + o];
      sum += w * S[a], squares += w * Q[a * outputs + o], shifted += w * j->shift[a % u->channels];
    }
    mean[o] = sum / count;
    double variance = squares / count - mean[o] * mean[o];
    if (variance < 0) variance = 0;
    inverse[o] = 1 / sqrt(variance + u->eps);
    scale[o] = gamma_of(u, o) * inverse[o];
    offset[o] = beta_of(u, o) - scale[o] * mean[o];
    if (u->running_mean) {
      const double unbiased = variance * count / (count - 1), m = u->momentum;
      u->running_mean[o] = (float)((1 - m) * u->running_mean[o] + m * (mean[o] + shifted));
      u->running_var[o] = (float)((1 - m) * u->running_var[o] + m * unbiased);
    }
  }
  free(Q);
  fold(j, scale, offset, j->folded, j->offset);
  return 0;
}

// Statistics of the groups of one image from its sums; `b` is the bias with what the shift adds.
static void group_statistics(const job *j, const double *S, const double *Q, const double *b,
                             double *mean, double *inverse) {
  const unit *u = j->u;
  const int64_t outputs = j->outputs, each_ = outputs / u->groups;
  const double area = (double)(u->conv_h * u->conv_w);
  for (int64_t g = 0; g < u->groups; g++) {
    double middle = 0, spread = 0;
    double m[each_], v[each_];
    for (int64_t i = 0; i < each_; i++) {
      const int64_t o = g * each_ + i;
      double sum = 0, squares = 0;
      for (int64_t a = 0; a < j->k; a++) {
        const double w = j->wt[a * outputs + o];
        sum += w * S[a], squares += w * Q[a * outputs + o];
      }
      m[i] = sum / area + b[o], v[i] = squares / area - sum / area * (sum / area);
      middle += m[i] / each_;
    }
    for (int64_t i = 0; i < each_; i++)
      spread += ((v[i] > 0 ? v[i] : 0) + (m[i] - middle) * (m[i] - middle)) / each_;
    mean[g] = middle, inverse[g] = 1 / sqrt(spread + u->eps);
  }
}

// The bias of each output for inputs less the shift.
static void shifted_bias(const job *j, double *b) {
  for (int64_t o = 0; o < j->outputs; o++) {
    b[o] = bias_of(j->u, o);
    for (int64_t a = 0; a < j->k; a++)
      b[o] += j->wt[a * j->outputs + o] * j->shift[a % j->u->channels];
  }
}

static void forward_chunk(job *j, int64_t chunk) {
  const unit *u = j->u;
  const int64_t k = j->k, outputs = j->outputs, grouped = u->norm == GROUP;
  float *image = room(4 * padded(j)), *ring = room(4 * u->pool_y * j->wide * BLOCK);
  float *planes = room(grouped * 4 * j->planes), *cols = room(grouped * 4 * k * SPAN);
  float *w = room(grouped * 4 * j->blocks * BLOCK * (k + 1)), *offset = w + j->blocks * BLOCK * k;
  double *G = room(8 * grouped * (k * k + k + k * outputs + 3 * outputs));
  if (image && ring && planes && cols && w && G) {
    memset(image, 0, 4 * padded(j));
    double *S = G + k * k, *Q = S + k, *b = Q + k * outputs, *scale = b + outputs;
    double *add = scale + outputs;
    if (grouped) shifted_bias(j, b);
    for (int64_t n = first_of(j, chunk); n < first_of(j, chunk + 1); n++) {
      if (grouped) {
        double *mean = kept_sums(j) + 2 * n * u->groups, *inverse = mean + u->groups;
        memset(G, 0, 8 * (k * k + k));
        gram(j, n, planes, cols, G, S);
        mirror(G, k);
        times_weights(j, G, Q);
        group_statistics(j, S, Q, b, mean, inverse);
        for (int64_t o = 0; o < outputs; o++) {
          const int64_t g = o / (outputs / u->groups);
          scale[o] = gamma_of(u, o) * inverse[g];
          add[o] = beta_of(u, o) + scale[o] * (b[o] - mean[g]);
        }
        fold(j, scale, add, w, offset);
      }
      pad(j, n, image);
      forward(j, n, image, grouped ? w : j->folded, grouped ? offset : j->offset, ring);
    }
  } else
    j->failed = 1;
  free(image), free(ring), free(planes), free(cols), free(w), free(G);
}

// --- backward -----------------------------------------------------------------------------------

// Write the patches of conv rows [y0, y1) one behind the other, each followed by a one.
static void patches(const job *j, const float *image, int64_t y0, int64_t y1, int64_t long_,
                    float *to) {
  const unit *u = j->u;
  const int64_t c = u->channels, step = u->stride_x * c, run = j->run, down = j->pw * c;
  for (int64_t y = y0; y < y1; y++)
    for (int64_t x = 0; x < u->conv_w; x++, to += long_) {
      const float *from = image + y * u->stride_y * down + x * step;
      for (int64_t v = 0; v < u->kernel_y; v++, from += down)
        for (int64_t e = 0; e < run; e += LANES) AT(to + v * run + e) = AT(from + e);
      to[j->k] = 1;
    }
}

// A += sum of d p over the pooled positions of a strip, for one output and `vectors` of a patch.
INLINE void scan(const int vectors, int64_t count, int64_t outputs, const float *d,
                 const int8_t *where, const int32_t *base, const int32_t *steps, const float *cols,
                 float *A) {
  vec even[TILE], odd[TILE];
  UNROLL for (int v = 0; v < vectors; v++) even[v] = AT(A + v * LANES), odd[v] = (vec){0};
  int64_t i = 0;
  for (; i + 1 < count; i += 2) {
    const int8_t t = where[i * outputs], s = where[(i + 1) * outputs];
    const float a = t < 0 ? 0 : d[i * outputs], b = s < 0 ? 0 : d[(i + 1) * outputs];
    const float *p = cols + (t < 0 ? 0 : base[i] + steps[t]);
    const float *q = cols + (s < 0 ? 0 : base[i + 1] + steps[s]);
    UNROLL for (int v = 0; v < vectors; v++) even[v] += a * AT(p + v * LANES);
    UNROLL for (int v = 0; v < vectors; v++) odd[v] += b * AT(q + v * LANES);
  }
  if (i < count && where[i * outputs] >= 0) {
    const float *p = cols + base[i] + steps[where[i * outputs]];
    UNROLL for (int v = 0; v < vectors; v++) even[v] += d[i * outputs] * AT(p + v * LANES);
  }
  UNROLL for (int v = 0; v < vectors; v++) AT(A + v * LANES) = even[v] + odd[v];
}

static void scan_all(int64_t vectors, int64_t count, int64_t outputs, const float *d,
                     const int8_t *where, const int32_t *base, const int32_t *steps,
                     const float *cols, float *A) {
#define CASE(n) case n: scan(n, count, outputs, d, where, base, steps, cols, A); break;
  for (; vectors > 0; vectors -= TILE, cols += TILE * LANES, A += TILE * LANES)
    switch (least(vectors, TILE)) {
      CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
    }
#undef CASE
}

// A[outputs][long_] = sum over the image of d p, and of d behind the patch.
static void sum_patches(const job *j, int64_t n, const float *image, int64_t long_, float *cols,
                        int32_t *base, float *A) {
  const unit *u = j->u;
  const int64_t row = u->conv_w * long_, tall = most(1, STRIP / (row * u->pool_stride_y));
  int32_t steps[128];
  for (int64_t t = 0; t < u->pool_y * u->pool_x; t++)
    steps[t] = (int32_t)(t / u->pool_x * row + t % u->pool_x * long_);
  memset(A, 0, 4 * u->outputs * long_);
  for (int64_t i0 = 0; i0 < u->out_h; i0 += tall) {
    const int64_t i1 = least(u->out_h, i0 + tall), from = i0 * u->pool_stride_y - u->pool_pad_y;
    const int64_t y0 = most(0, from);
    const int64_t y1 = least(u->conv_h, (i1 - 1) * u->pool_stride_y - u->pool_pad_y + u->pool_y);
    patches(j, image, y0, y1, long_, cols);
    int64_t count = 0;
    for (int64_t i = i0; i < i1; i++)
      for (int64_t k = 0; k < u->out_w; k++) {
        const int64_t y = i * u->pool_stride_y - u->pool_pad_y - y0;
        base[count++] = (int32_t)(y * row + (k * u->pool_stride_x - u->pool_pad_x) * long_);
      }
    const int64_t at = (n * u->out_h + i0) * u->out_w * u->outputs;
    for (int64_t o = 0; o < u->outputs; o++)
      scan_all(long_ / LANES, count, u->outputs, u->d_out + at + o, u->where + at + o, base, steps,
               cols, A + o * long_);
  }
}

static int64_t long_of(const job *j) { return up(j->k + 1, LANES); }

// Numbers in the patches of a strip, and what may be written behind them.
static int64_t strip_of(const job *j) {
  const unit *u = j->u;
  const int64_t row = u->conv_w * long_of(j);
  const int64_t tall = most(1, STRIP / (row * u->pool_stride_y));
  const int64_t rows = (tall - 1) * u->pool_stride_y + u->pool_y;
  return least(rows, u->conv_h) * row + (j->k / LANES + 2) * LANES;
}

static int64_t places_of(const job *j) {
  const unit *u = j->u;
  const int64_t tall = most(1, STRIP / (u->conv_w * long_of(j) * u->pool_stride_y));
  return least(tall, u->out_h) * u->out_w;
}

// Gradients of one image where groups are normalised. `to`: dW [K][outputs], db, dgamma, dbeta.
// `scale`, `slope`, `add`: the gradient at the convolution is scale d + slope z + add.
static void group_gradients(const job *j, int64_t n, const double *S, const double *Q,
                            const double *b, const float *A, int64_t long_, double *to,
                            double *scale, double *slope, double *add) {
  const unit *u = j->u;
  const int64_t k = j->k, outputs = j->outputs, each_ = outputs / u->groups;
  const double area = (double)(u->conv_h * u->conv_w), size = area * each_;
  const double *mean = kept_sums(j) + 2 * n * u->groups, *inverse = mean + u->groups;
  double *bias = to + k * outputs, *gamma = bias + outputs, *beta = gamma + outputs;
  for (int64_t g = 0; g < u->groups; g++) {
    double c1 = 0, c2 = 0;
    for (int64_t o = g * each_; o < (g + 1) * each_; o++) {
      double dz = 0;
      for (int64_t a = 0; a < k; a++) dz += j->wt[a * outputs + o] * A[o * long_ + a];
      const double d = A[o * long_ + k], hat = inverse[g] * (dz + (b[o] - mean[g]) * d);
      gamma[o] += hat, beta[o] += d;
      c1 += gamma_of(u, o) * d / size, c2 += gamma_of(u, o) * hat / size;
    }
    for (int64_t o = g * each_; o < (g + 1) * each_; o++) {
      const double i = inverse[g], middle = b[o] - mean[g];
      scale[o] = i * gamma_of(u, o), slope[o] = -i * i * c2, add[o] = -i * c1 + slope[o] * middle;
      double ws = 0;
      for (int64_t a = 0; a < k; a++) ws += j->wt[a * outputs + o] * S[a];
      const double all = scale[o] * A[o * long_ + k] + slope[o] * ws + add[o] * area;
      bias[o] += all;
      for (int64_t a = 0; a < k; a++)
        to[a * outputs + o] += scale[o] * A[o * long_ + a] + slope[o] * Q[a * outputs + o] +
                               add[o] * S[a] + j->shift[a % u->channels] * all;
    }
  }
}

// Write the gradient at the convolution: a linear function of its outputs, and d where it is.
static void spread(const job *j, int64_t n, const float *image, const double *scale,
                   const float *w, const float *b, float *row) {
  const unit *u = j->u;
  const int64_t o = u->outputs;
  float *to = u->d_conv + n * u->conv_h * u->conv_w * o;
  for (int64_t block = 0; block < j->blocks; block++) {
    const int64_t fits = least(BLOCK, o - block * BLOCK);
    for (int64_t y = 0; y < u->conv_h; y++) {
      conv_row(j, image, y, w + block * j->k * BLOCK, b + block * BLOCK, row);
      for (int64_t x = 0; x < u->conv_w; x++)
        memcpy(to + (y * u->conv_w + x) * o + block * BLOCK, row + x * BLOCK, 4 * fits);
    }
  }
  for (int64_t i = 0; i < u->out_h; i++)
    for (int64_t k = 0; k < u->out_w; k++) {
      const int64_t at = ((n * u->out_h + i) * u->out_w + k) * o;
      for (int64_t c = 0; c < o; c++) {
        const int64_t t = u->where[at + c];
        if (t < 0) continue;
        const int64_t y = i * u->pool_stride_y - u->pool_pad_y + t / u->pool_x;
        const int64_t x = k * u->pool_stride_x - u->pool_pad_x + t % u->pool_x;
        to[(y * u->conv_w + x) * o + c] += (float)(scale[c] * u->d_out[at + c]);
      }
    }
}

// Sums of a chunk: AFFINE and BATCH: A, by output; GROUP: the gradients.
static void backward_chunk(job *j, int64_t chunk) {
  const unit *u = j->u;
  const int64_t k = j->k, outputs = j->outputs, long_ = long_of(j), grouped = u->norm == GROUP;
  float *image = room(4 * padded(j)), *cols = room(4 * strip_of(j));
  float *A = room(4 * outputs * long_), *planes = room(grouped * 4 * j->planes);
  float *spans = room(grouped * 4 * k * SPAN), *w = room(4 * j->blocks * BLOCK * (k + 1));
  float *row = room(4 * j->wide * BLOCK);
  int32_t *base = room(4 * places_of(j));
  double *G = room(8 * (grouped * (k * k + k + k * outputs) + 4 * outputs));
  double *sums = j->sums + chunk * j->stride;
  if (image && cols && A && planes && spans && w && base && G && row) {
    memset(image, 0, 4 * padded(j));
    memset(cols, 0, 4 * strip_of(j));
    double *b = G, *scale = b + outputs, *slope = scale + outputs, *add = slope + outputs;
    double *grams = add + outputs, *S = grams + k * k, *Q = S + k;
    if (grouped) shifted_bias(j, b);
    for (int64_t n = first_of(j, chunk); n < first_of(j, chunk + 1); n++) {
      pad(j, n, image);
      sum_patches(j, n, image, long_, cols, base, A);
      if (!grouped) {
        for (int64_t o = 0; o < outputs; o++)
          for (int64_t a = 0; a <= k; a++) sums[o * (k + 1) + a] += A[o * long_ + a];
        continue;
      }
      memset(grams, 0, 8 * (k * k + k));
      gram(j, n, planes, spans, grams, S);
      mirror(grams, k);
      times_weights(j, grams, Q);
      group_gradients(j, n, S, Q, b, A, long_, sums, scale, slope, add);
      if (!u->d_conv) continue;
      fold(j, slope, add, w, w + j->blocks * BLOCK * k);
      spread(j, n, image, scale, w, w + j->blocks * BLOCK * k, row);
    }
  } else
    j->failed = 1;
  free(image), free(cols), free(A), free(planes), free(spans), free(w), free(base), free(G);
  free(row);
}

static void spread_chunk(job *j, int64_t chunk) {
  float *image = room(4 * padded(j)), *row = room(4 * j->wide * BLOCK);
  if (image && row) {
    memset(image, 0, 4 * padded(j));
    for (int64_t n = first_of(j, chunk); n < first_of(j, chunk + 1); n++) {
      pad(j, n, image);
      spread(j, n, image, j->sums, j->folded, j->offset, row);
    }
  } else
    j->failed = 1;
  free(image), free(row);
}

static void store(const job *j, int64_t a, int64_t o, double value) {
  const unit *u = j->u;
  const int64_t c = a % u->channels, x = a / u->channels % u->kernel_x;
  const int64_t y = a / u->channels / u->kernel_x;
  u->d_weight[o * u->w_output + c * u->w_channel + y * u->w_row + x * u->w_column] = (float)value;
}

// Gradients from A where each output is normalised by itself.
static int own_gradients(job *j) {
  const unit *u = j->u;
  const int64_t k = j->k, outputs = j->outputs, by_batch = u->norm == BATCH;
  const double count = (double)(u->images * u->conv_h * u->conv_w);
  double *A = room(8 * outputs * (k + 1)), *Q = room(8 * k * outputs);
  const double *G = kept_sums(j), *S = G + k * k, *mean = by_batch ? S + k : G;
  const double *inverse = mean + outputs;
  double scale[outputs], slope[outputs], add[outputs];
  if (A && Q) {
    reduce(j, A, outputs * (k + 1));
    if (by_batch) times_weights(j, G, Q);
    for (int64_t o = 0; o < outputs; o++) {
      const double d = A[o * (k + 1) + k], middle = (by_batch ? 0 : bias_of(u, o)) - mean[o];
      double hat = middle * d;
      for (int64_t a = 0; a < k; a++) hat += j->wt[a * outputs + o] * A[o * (k + 1) + a];
      hat *= inverse[o];
      scale[o] = gamma_of(u, o) * inverse[o];
      slope[o] = by_batch ? -scale[o] * inverse[o] * hat / count : 0;
      add[o] = by_batch ? slope[o] * middle - scale[o] * d / count : 0;
      u->d_gamma[o] = (float)hat, u->d_beta[o] = (float)d;
      u->d_bias[o] = by_batch ? 0 : (float)(scale[o] * d);
      for (int64_t a = 0; a < k; a++) {
        double sum = scale[o] * A[o * (k + 1) + a];
        if (by_batch) sum += slope[o] * Q[a * outputs + o] + add[o] * S[a];
        store(j, a, o, sum);
      }
    }
    if (u->d_conv) {
      fold(j, slope, add, j->folded, j->offset);
      memcpy(j->sums, scale, 8 * outputs);
      each(j, spread_chunk);
    }
  }
  const int failed = !A || !Q;
  free(A), free(Q);
  return failed;
}

static int group_backward(job *j) {
  const unit *u = j->u;
  const int64_t k = j->k, outputs = j->outputs, all = (k + 3) * outputs;
  double *sums = room(8 * all);
  if (!sums) return 1;
  reduce(j, sums, all);
  for (int64_t o = 0; o < outputs; o++) {
    for (int64_t a = 0; a < k; a++) store(j, a, o, sums[a * outputs + o]);
    u->d_bias[o] = (float)sums[k * outputs + o];
    u->d_gamma[o] = (float)sums[(k + 1) * outputs + o];
    u->d_beta[o] = (float)sums[(k + 2) * outputs + o];
  }
  free(sums);
  return 0;
}

// --- what is called -----------------------------------------------------------------------------

static int begin(job *j, const unit *u, int64_t stride) {
  memset(j, 0, sizeof *j);
  j->u = u, j->outputs = u->outputs, j->run = u->kernel_x * u->channels;
  j->k = j->run * u->kernel_y, j->blocks = up(u->outputs, BLOCK) / BLOCK;
  j->pw = u->width + 2 * u->pad_x, j->ph = u->height + 2 * u->pad_y;
  j->planes = u->channels * j->pw * j->ph, j->wide = up(u->conv_w, ROWS);
  j->chunks = least(u->images, CHUNKS), j->stride = up(stride, 8);
  j->folded = room(4 * j->blocks * BLOCK * j->k), j->offset = room(4 * j->blocks * BLOCK);
  j->shift = room(4 * u->channels), j->wt = room(8 * j->k * u->outputs);
  j->sums = room(8 * j->chunks * j->stride);
  if (!j->folded || !j->offset || !j->shift || !j->wt || !j->sums) return 1;
  memset(j->shift, 0, 4 * u->channels);
  memset(j->sums, 0, 8 * j->chunks * j->stride);
  for (int64_t o = 0; o < u->outputs; o++)
    for (int64_t a = 0; a < j->k; a++) {
      const int64_t c = a % u->channels, x = a / u->channels % u->kernel_x;
      const int64_t y = a / u->channels / u->kernel_x;
      j->wt[a * u->outputs + o] =
          u->weight[o * u->w_output + c * u->w_channel + y * u->w_row + x * u->w_column];
    }
  return 0;
}

static int end(job *j, int failed) {
  free(j->folded), free(j->offset), free(j->shift), free(j->wt), free(j->sums);
  return failed || j->failed;
}

// Both return 0, or 1 if there is no memory.
int fedsys_unit_forward(const unit *u) {
  job j;
  const int64_t k = u->kernel_y * u->kernel_x * u->channels;
  if (begin(&j, u, k * k + k)) return end(&j, 1);
  if (u->norm != AFFINE) find_shift(&j);
  for (int64_t c = 0; c < u->channels; c++) u->keep[c] = j.shift[c];
  int failed = 0;
  if (u->norm == AFFINE) affine(&j);
  if (u->norm == BATCH) failed = batch(&j);
  if (!failed && !j.failed) each(&j, forward_chunk);
  return end(&j, failed);
}

int fedsys_unit_backward(const unit *u) {
  job j;
  const int64_t k = u->kernel_y * u->kernel_x * u->channels;
  if (begin(&j, u, (k + 3) * u->outputs)) return end(&j, 1);
  for (int64_t c = 0; c < u->channels; c++) j.shift[c] = (float)u->keep[c];
  each(&j, backward_chunk);
  if (j.failed) return end(&j, 1);
  return end(&j, u->norm == GROUP ? group_backward(&j) : own_gradients(&j));
}
"""
