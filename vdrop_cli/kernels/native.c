/* The masked cells and the softmax of the head for the CPU: whole recurrences, forward and backward, with what lies between their products.

   T time  B batch  N rows: the steps of all sequences, step after step  H hidden size  G gates (LSTM i f g o; GRU r z n)  V vocabulary

   A recurrence is one call. Its threads share the hidden units in blocks of 16: a thread multiplies the weights of its units, applies
   the gates while the products are still in its first cache, and waits for the others once a step. `kernels/native.py` calls this file
   through ctypes, `kernels/compiler.py` compiles it. It includes itself once for each pair of types: REAL, of states and sums, and LOW,
   that products are multiplied in. */

#ifndef REAL

#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define BLOCK 16     /* units, or columns of a product, that are worked on together */
#define MAX_ROWS 32  /* rows, likewise */
#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif

typedef ptrdiff_t size;
typedef uint16_t bf16;
typedef uint32_t __attribute__((may_alias)) word; /* two numbers of bf16 */

/* A mask of [T|1, G|1, B|1, H] by its strides, in elements; no mask where `data` is NULL. */
struct mask {
    const void *data;
    size t, g, b;
};

struct recurrence {
    size steps, batch, hidden, depth;          /* depth: columns of `inputs` and of each gate of `da`, H and zeros up to what LOW needs */
    size groups;                               /* of recurrent inputs: 1, or one a gate where the mask of h differs by gate */
    size gate_row, gate_stride;                /* of `gates`: elements from row to row, and from gate to gate */
    size da_row, da_stride;                    /* of `da` */
    size threads, reset_after;
    const int64_t *first;                      /* [T + 1] the row where each step begins */
    const int64_t *places;                     /* [N] the row of `y` and `dy` that each row is; NULL: the same */
    void *gates;                               /* REAL, the input products; after the forward pass the gates themselves */
    const void *bias, *bias_n;                 /* REAL [G·H]; GRU with reset_after: [H], inside the reset gate */
    struct mask mask_h, mask_c;
    const void *weights;                       /* LOW, packed */
    void *inputs;                              /* LOW [2, groups, B, depth], zeros: what enters the recurrent products of a step */
    void *inputs_n;                            /* LOW [B, depth], zeros: r ∘ m ∘ h of a GRU */
    void *h, *c;                               /* REAL [B + N, H] states: at the start, then after each step */
    void *y;                                   /* REAL outputs */
    void *inner;                               /* REAL [N, H] of a GRU with reset_after: U_n (m ∘ h) + b */
    const void *dy;                            /* REAL, or NULL */
    const void *dcells;                        /* REAL, as dy: gradients of the cell states of all steps, or NULL */
    void *dh, *dc;                             /* REAL [B, H] gradients of the last states; at the end of the first */
    void *da;                                  /* LOW: gradients of the gates */
    void *da_inner;                            /* LOW [N, depth] of a GRU with reset_after: the gradient of `inner` */
    void *bias_sums;                           /* REAL [threads, G + 1, H], zeros: gradients of the biases; the last of `inner` */
};

/* Where a thread's share of `items` begins. */
INLINE size share(size items, size thread, size threads) { return items * thread / threads; }
INLINE size at_most(size a, size b) { return a < b ? a : b; }
INLINE size place_of(const struct recurrence *p, size row) { return p->places ? p->places[row] : row; }

/* The 32 bits of x rounded to bf16, the lower half of which is to be ignored. NaN stays NaN. */
INLINE uint32_t rounded_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : bits + 0x7fff + ((bits >> 16) & 1);
}

INLINE bf16 round_to_bf16(float x) { return (bf16)(rounded_bits(x) >> 16); }

INLINE float from_high_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* Tiles of AMX: 16 rows of 64 bytes. Sums are tiles 0 to 3, for two blocks of rows and two of columns. */

struct worker {
    int tile_rows; /* that the tiles of this thread are configured for; 0: none */
};

#if HAS_AMX
static int amx_is_ready = 0;

struct __attribute__((packed, aligned(64))) tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

static void configure_tiles(struct worker *worker, int rows) {
    if (worker->tile_rows == rows) return;
    int first = rows < 16 ? rows : 16, second = rows - first;
    struct tile_config config = {.palette = 1};
    const int tile_rows[8] = {first, first, second, second, first, second, 16, 16};
    for (int tile = 0; tile < 8; tile++) {
        config.rows[tile] = (uint8_t)tile_rows[tile];
        config.bytes[tile] = tile_rows[tile] ? 64 : 0;
    }
    __asm__ volatile("" : : "m"(config)); /* to GCC, the next line reads 8 of its 64 bytes */
    _tile_loadconfig(&config);
    worker->tile_rows = rows;
}

INLINE void release_tiles(struct worker *worker) {
    if (worker->tile_rows) _tile_release();
    worker->tile_rows = 0;
}

/* A matrix [rows, depth] of bf16 where it lies: bytes from row to row, from 32 columns to the next 32, and where row 16 begins. */
struct left {
    const char *data;
    size row, tile, second;
};

/* Sums of up to 32 rows and one or two blocks of 16 columns into `out`, whose rows are `out_row` bytes apart, or onto what is there. */
INLINE void multiply_tiles_of(const int tall, const int wide, size tiles, struct left a, const char *w0, const char *w1, char *out0, char *out1,
                              size out_row, int add) {
    const char *a0 = a.data, *a1 = a.data + a.second;
    _tile_zero(0);
    if (wide) _tile_zero(1);
    if (tall) _tile_zero(2);
    if (tall && wide) _tile_zero(3);
    if (add) {
        _tile_loadd(0, out0, out_row);
        if (wide) _tile_loadd(1, out1, out_row);
        if (tall) _tile_loadd(2, out0 + 16 * out_row, out_row);
        if (tall && wide) _tile_loadd(3, out1 + 16 * out_row, out_row);
    }
    for (size k = 0; k < tiles; k++) {
        _tile_loadd(4, a0 + k * a.tile, a.row);
        _tile_loadd(6, w0 + k * 1024, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (wide) {
            _tile_loadd(7, w1 + k * 1024, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (tall) {
            _tile_loadd(5, a1 + k * a.tile, a.row);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (tall && wide) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out0, out_row);
    if (wide) _tile_stored(1, out1, out_row);
    if (tall) _tile_stored(2, out0 + 16 * out_row, out_row);
    if (tall && wide) _tile_stored(3, out1 + 16 * out_row, out_row);
}

static void multiply_tiles(struct worker *worker, int rows, size tiles, struct left a, const char *w0, const char *w1, char *out0, char *out1,
                           size out_row, int add) {
    __asm__ volatile("" : : : "memory"); /* to GCC, loads of tiles read no memory */
    configure_tiles(worker, rows);
    if (rows > 16 && w1)
        multiply_tiles_of(1, 1, tiles, a, w0, w1, out0, out1, out_row, add);
    else if (rows > 16)
        multiply_tiles_of(1, 0, tiles, a, w0, w1, out0, out1, out_row, add);
    else if (w1)
        multiply_tiles_of(0, 1, tiles, a, w0, w1, out0, out1, out_row, add);
    else
        multiply_tiles_of(0, 0, tiles, a, w0, w1, out0, out1, out_row, add);
}
#else
INLINE void release_tiles(struct worker *worker) { worker->tile_rows = 0; }
#endif

/* What the library uses, by bits: 1 products of bf16 in hardware, 2 AMX, whose use the kernel of the system has to allow first,
   4 AVX-512, 8 AVX2, 16 NEON. */
int vdrop_features(void) {
    int features = 0;
#if defined(__AVX512BF16__)
    features |= 1;
#endif
#if HAS_AMX
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0) {
        amx_is_ready = 1;
        features |= 3;
    }
#endif
#if defined(__AVX512F__)
    features |= 4;
#elif defined(__AVX2__)
    features |= 8;
#elif defined(__ARM_NEON)
    features |= 16;
#endif
    return features;
}

/* 16 × 16 numbers of 32 bits, rows `from_row` apart, transposed. */
INLINE void transpose(const word *from, size from_row, word *to) {
#if defined(__AVX512F__)
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * from_row);
    for (int i = 0; i < 8; i++) {
        b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
        a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        __m512i low0 = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88), high0 = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        __m512i low1 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88), high1 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
        _mm512_storeu_si512(to + 16 * i, _mm512_shuffle_i32x4(low0, low1, 0x88));
        _mm512_storeu_si512(to + 16 * (i + 4), _mm512_shuffle_i32x4(high0, high1, 0x88));
        _mm512_storeu_si512(to + 16 * (i + 8), _mm512_shuffle_i32x4(low0, low1, 0xdd));
        _mm512_storeu_si512(to + 16 * (i + 12), _mm512_shuffle_i32x4(high0, high1, 0xdd));
    }
#else
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) to[16 * j + i] = from[i * from_row + j];
#endif
}

/* A row of up to `depth` numbers, rounded, with zeros behind them; and what rounding lost of them, unless `rest` is NULL. */
INLINE void round_row(const float *from, size columns, size depth, bf16 *to, bf16 *rest) {
    for (size j = 0; j < columns; j++) to[j] = round_to_bf16(from[j]);
    if (rest)
        for (size j = 0; j < columns; j++) rest[j] = round_to_bf16(from[j] - from_high_bits(rounded_bits(from[j]) & 0xffff0000u));
    for (size j = columns; j < depth; j++) to[j] = 0;
    if (rest)
        for (size j = columns; j < depth; j++) rest[j] = 0;
}

/* `to` [rows, depth] = from [rows, columns] ∘ mask, rounded, with zeros up to `depth`; into `rest`, unless it is NULL, what that loses.
   Row n is sequence n % batch of step n / batch. */
void vdrop_round_rows(const float *from, size rows, size columns, const float *mask, size mask_t, size mask_b, size batch, bf16 *to, bf16 *rest,
                      size depth, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size n = 0; n < rows; n++) {
        const float *x = from + n * columns;
        bf16 *out = to + n * depth;
        if (!mask) {
            round_row(x, columns, depth, out, rest ? rest + n * depth : NULL);
            continue;
        }
        const float *m = mask + n / batch * mask_t + n % batch * mask_b;
        for (size j = 0; j < columns; j++) out[j] = round_to_bf16(x[j] * m[j]);
        for (size j = columns; j < depth; j++) out[j] = 0;
    }
}

/* Of 32 rows of bf16, from row 32 · `tile` on, 16 columns: out [16 pairs of rows][16 columns], zeros beyond the ends. */
INLINE void pairs_of_rows(const bf16 *from, size from_row, size tile, size depth, size wide, word *out) {
    for (size pair = 0; pair < 16; pair++, out += 16) {
        size k = tile * 32 + 2 * pair;
        const bf16 *first = from + k * from_row, *second = first + from_row;
        if (k + 1 < depth && wide == BLOCK) {
            for (int j = 0; j < BLOCK; j++) out[j] = first[j] | (uint32_t)second[j] << 16;
        } else {
            for (int j = 0; j < BLOCK; j++)
                out[j] = (k < depth && j < wide ? first[j] : 0) | (uint32_t)(k + 1 < depth && j < wide ? second[j] : 0) << 16;
        }
    }
}

/* Rows of bf16 [depth, columns] as the right side of a product: [columns / 16][depth / 32][16 pairs of rows][16 columns][2]. */
void vdrop_pack_rows(const bf16 *from, size from_row, size depth, size columns, bf16 *to, int threads) {
    size blocks = (columns + BLOCK - 1) / BLOCK, tiles = (depth + 31) / 32;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size tile = 0; tile < tiles; tile++)
        for (size block = 0; block < blocks; block++)
            pairs_of_rows(from + block * BLOCK, from_row, tile, depth, at_most(columns - block * BLOCK, BLOCK),
                          (word *)(to + (block * tiles + tile) * 512));
}

/* Rows of bf16 [depth, columns], transposed, as the left side of a product: [columns / 16][depth / 32][16 columns][32 rows]. */
void vdrop_pack_transposed(const bf16 *from, size from_row, size depth, size columns, bf16 *to, int threads) {
    size blocks = (columns + BLOCK - 1) / BLOCK, tiles = (depth + 31) / 32;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size tile = 0; tile < tiles; tile++)
        for (size block = 0; block < blocks; block++) {
            word pairs[16 * 16] __attribute__((aligned(64)));
            pairs_of_rows(from + block * BLOCK, from_row, tile, depth, at_most(columns - block * BLOCK, BLOCK), pairs);
            transpose(pairs, 16, (word *)(to + (block * tiles + tile) * 512));
        }
}

/* Weights of `gates` matrices as the right side of products, rounded, and into `rest`, unless it is NULL, what that loses of them.
   [columns / 16][gates][depth / 2][16 columns][2], zeros beyond the ends; `depth` is a multiple of 32. `across`: the rows of weights are
   columns of the product. Rows are read from end to end, into `scratch`: [threads, 64, the longer side of a matrix]. */
void vdrop_pack_bf16(const float *from, size from_gate, size from_row, int across, size gates, size inputs, size columns, size depth, bf16 *to,
                     bf16 *rest, bf16 *scratch, int threads) {
    size blocks = (columns + BLOCK - 1) / BLOCK, tiles = depth / 32;
    size high = across ? BLOCK : 32, outer = across ? blocks : tiles, wide = across ? depth : blocks * BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (size gate = 0; gate < gates; gate++)
        for (size part = 0; part < outer; part++) {
            bf16 *rows = scratch + omp_get_thread_num() * 64 * wide, *rests = rest ? rows + 32 * wide : NULL;
            size there = at_most((across ? columns : inputs) - part * high, high);
            for (size row = 0; row < high; row++)
                round_row(from + gate * from_gate + (part * high + row) * from_row, row < there ? (across ? inputs : columns) : 0, wide,
                          rows + row * wide, rests ? rests + row * wide : NULL);
            for (int second = 0; second <= (rest != NULL); second++) {
                const bf16 *in = second ? rests : rows;
                bf16 *out = second ? rest : to;
                if (across)
                    for (size tile = 0; tile < tiles; tile++)
                        transpose((const word *)(in + tile * 32), wide / 2, (word *)(out + ((part * gates + gate) * tiles + tile) * 512));
                else
                    for (size block = 0; block < blocks; block++)
                        pairs_of_rows(in + block * BLOCK, wide, 0, 32, BLOCK, (word *)(out + ((block * gates + gate) * tiles + part) * 512));
            }
        }
}

#if HAS_AMX
/* A product c [rows, columns] (+)= Σ a_s · w_s of up to three pairs, by bytes: `a` by its rows, its tiles of 32 columns and blocks of 16
   rows, `w` packed, by its blocks of 16 columns. */
struct gemm {
    size rows, columns, tiles, threads, add, pairs;
    const char *a[3], *w[3];
    size a_row, a_tile, a_block, w_block;
    float *c;
    size c_row; /* elements */
};

/* How many are worked on at once, of `all` at most `most`, so that each time it is about as many. */
INLINE size even_part(size all, size most) {
    size parts = (all + most - 1) / most;
    return parts ? (all + parts - 1) / parts : 1;
}

/* A block of up to 32 rows and 32 columns. */
INLINE void multiply_block(const struct gemm *p, struct worker *worker, size row, size column, size k, size tiles) {
    float edge[32][32] __attribute__((aligned(64)));
    size tall = at_most(p->rows - row, 32), wide = at_most(p->columns - column, 32);
    int add = p->add || k > 0, whole = wide == 32;
    float *c = p->c + row * p->c_row + column, *out = whole ? c : edge[0];
    size out_row = whole ? p->c_row : 32;
    if (!whole && add)
        for (size i = 0; i < tall; i++) memcpy(edge[i], c + i * p->c_row, (size_t)wide * 4);
    for (size i = 0; i < tall; i++) { /* on the way from memory while tiles are multiplied */
        __builtin_prefetch(c + i * p->c_row, 1);
        __builtin_prefetch(c + i * p->c_row + wide - 1, 1);
    }
    for (size pair = 0; pair < p->pairs; pair++) {
        struct left left = {p->a[pair] + row / 16 * p->a_block + k * p->a_tile, p->a_row, p->a_tile, p->a_block};
        const char *w = p->w[pair] + column / 16 * p->w_block + k * 1024;
        multiply_tiles(worker, (int)tall, tiles, left, w, wide > 16 ? w + p->w_block : NULL, (char *)out, (char *)(out + 16), out_row * 4,
                       add || pair > 0);
    }
    if (!whole)
        for (size i = 0; i < tall; i++) memcpy(c + i * p->c_row, edge[i], (size_t)wide * 4);
}

#define DEEP 24            /* tiles of depth that are multiplied at once, at most */
#define PANEL (600 * 1024) /* bytes of the inner matrix, which stay in the second cache */

/* The smaller of the two matrices is the inner one: a part of it is multiplied with each block of the outer one. */
void vdrop_gemm(const struct gemm *p) {
    size row_blocks = (p->rows + 31) / 32, column_blocks = (p->columns + 31) / 32;
    int rows_outside = p->rows > p->columns;
    size outer = rows_outside ? row_blocks : column_blocks, inner = rows_outside ? column_blocks : row_blocks;
    size deep = even_part(p->tiles, DEEP), matrices = p->pairs > 1 ? 2 : 1;
    size panel = even_part(inner, PANEL / (deep * 2048 * matrices));
#pragma omp parallel num_threads(p->threads)
    {
        struct worker worker = {0};
        size thread = omp_get_thread_num(), all = omp_get_num_threads();
        for (size k = 0; k < p->tiles; k += deep)
            for (size first = 0; first < inner; first += panel) {
                size wide = at_most(panel, inner - first), end = share(outer * wide, thread + 1, all);
                for (size item = share(outer * wide, thread, all); item < end; item++) {
                    size out = 32 * (item / wide), in = 32 * (first + item % wide);
                    multiply_block(p, &worker, rows_outside ? out : in, rows_outside ? in : out, k, at_most(deep, p->tiles - k));
                }
            }
        release_tiles(&worker);
    }
}
#endif

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(name) PASTE(name, VARIANT)

#define REAL float
#define LOW float
#define VARIANT f32
#include "native.c"
#undef LOW
#undef VARIANT

#define LOW bf16
#define LOW_IS_BF16
#define VARIANT bf16
#include "native.c"
#undef LOW_IS_BF16
#undef LOW
#undef VARIANT
#undef REAL

#define REAL double
#define LOW double
#define REAL_IS_DOUBLE
#define VARIANT f64
#include "native.c"

#else /* for each pair of types */

#ifdef REAL_IS_DOUBLE
typedef int64_t NAME(bits);
#define ROUNDING 6755399441055744.0 /* 1.5 · 2^52: a sum with it has no fraction */
#define MANTISSA 52
#define BIAS 1023
#define LIMIT 1000.0
#define LN2_HIGH 0.693147180369123816490
#define LN2_LOW 1.90821492927058770002e-10
#else
typedef int32_t NAME(bits);
#define ROUNDING 12582912.0f /* 1.5 · 2^23 */
#define MANTISSA 23
#define BIAS 127
#define LIMIT 120.0f
#define LN2_HIGH 0.693359375f
#define LN2_LOW -2.12194440e-4f
#endif

typedef REAL NAME(vec) __attribute__((vector_size(WIDTH), aligned(sizeof(REAL)), may_alias));
typedef uint32_t NAME(words) __attribute__((vector_size(WIDTH), aligned(4), may_alias));

INLINE REAL NAME(power_of_two)(NAME(bits) n) {
    NAME(bits) bits = (n + BIAS) << MANTISSA;
    REAL x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* exp(r) - 1 for |r| ≤ ln 2 / 2, by its Taylor series: the rest is below half of the last place. */
INLINE REAL NAME(small_expm1)(REAL r) {
#ifdef REAL_IS_DOUBLE
    REAL p = (REAL)(1 / 87178291200.0);
    p = p * r + (REAL)(1 / 6227020800.0);
    p = p * r + (REAL)(1 / 479001600.0);
    p = p * r + (REAL)(1 / 39916800.0);
    p = p * r + (REAL)(1 / 3628800.0);
    p = p * r + (REAL)(1 / 362880.0);
    p = p * r + (REAL)(1 / 40320.0);
    p = p * r + (REAL)(1 / 5040.0);
#else
    REAL p = (REAL)(1 / 5040.0);
#endif
    p = p * r + (REAL)(1 / 720.0);
    p = p * r + (REAL)(1 / 120.0);
    p = p * r + (REAL)(1 / 24.0);
    p = p * r + (REAL)(1 / 6.0);
    p = p * r + (REAL)0.5;
    return p * r * r + r;
}

/* x = n ln 2 + r. NaN stays NaN. */
INLINE REAL NAME(reduce)(REAL x, NAME(bits) * n) {
    REAL shifted = x * (REAL)1.44269504088896340736 + ROUNDING, magic = ROUNDING;
    NAME(bits) bits, zero;
    memcpy(&bits, &shifted, sizeof bits);
    memcpy(&zero, &magic, sizeof zero);
    *n = bits - zero;
    shifted -= ROUNDING;
    return x - shifted * (REAL)LN2_HIGH - shifted * (REAL)LN2_LOW;
}

INLINE REAL NAME(clamp)(REAL x, REAL limit) {
    x = x > limit ? limit : x;
    return x < -limit ? -limit : x;
}

INLINE REAL NAME(exponential)(REAL x) {
    NAME(bits) n;
    REAL r = NAME(reduce)(NAME(clamp)(x, LIMIT), &n), p = NAME(small_expm1)(r) + 1;
    NAME(bits) half = n >> 1; /* in two steps, which reach infinity and the smallest numbers */
    return p * NAME(power_of_two)(half) * NAME(power_of_two)(n - half);
}

INLINE REAL NAME(sigmoid)(REAL x) { return 1 / (1 + NAME(exponential)(-x)); }

/* (exp(2x) - 1) / (exp(2x) + 1), exact to the last places near zero, too. */
INLINE REAL NAME(hyperbolic)(REAL x) {
    NAME(bits) n;
    REAL r = NAME(reduce)(NAME(clamp)(2 * x, 40), &n), scale = NAME(power_of_two)(n);
    REAL e = scale * NAME(small_expm1)(r) + (scale - 1);
    return e / (e + 2);
}

INLINE LOW NAME(lower)(REAL x) {
#ifdef LOW_IS_BF16
    return round_to_bf16(x);
#else
    return x;
#endif
}

/* Products of few rows with packed weights */

#define AHEAD 32 /* rows of packed weights that are on the way to the first cache while one is used */
#define LANES ((int)(WIDTH / sizeof(REAL)))
#define VECTORS (BLOCK / LANES)

/* out [rows, 16] (+)= a [rows, depth] · w, where `rows` is known to the compiler: all sums stay in registers. */
INLINE void NAME(multiply_rows)(const int rows, size depth, const LOW *a, size a_row, const LOW *w, REAL *out, int add) {
    NAME(vec) sums[24][VECTORS];
#pragma GCC unroll 24
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) sums[r][v] = add ? *(NAME(vec) *)(out + r * BLOCK + v * LANES) : (NAME(vec)){0};
#ifdef LOW_IS_BF16
    for (size k = 0; k < depth; k += 2) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) {
            NAME(words) pair = *(const NAME(words) *)(w + k * BLOCK + v * 2 * LANES);
#if !defined(__AVX512BF16__)
            NAME(vec) low = (NAME(vec))(pair << 16), high = (NAME(vec))(pair & 0xffff0000u);
#endif
#pragma GCC unroll 24
            for (int r = 0; r < rows; r++) {
                uint32_t both;
                memcpy(&both, a + r * a_row + k, 4);
#if defined(__AVX512BF16__)
                sums[r][v] = (NAME(vec))_mm512_dpbf16_ps((__m512)sums[r][v], (__m512bh)_mm512_set1_epi32((int)both), (__m512bh)pair);
#else
                sums[r][v] += from_high_bits(both << 16) * low + from_high_bits(both & 0xffff0000u) * high;
#endif
            }
        }
    }
#else
    for (size k = 0; k < depth; k++) {
        NAME(vec) column[VECTORS];
        __builtin_prefetch(w + (k + AHEAD) * BLOCK); /* weights lie beyond the second cache */
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) column[v] = *(const NAME(vec) *)(w + k * BLOCK + v * LANES);
#pragma GCC unroll 24
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) sums[r][v] += a[r * a_row + k] * column[v];
    }
#endif
#pragma GCC unroll 24
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) *(NAME(vec) *)(out + r * BLOCK + v * LANES) = sums[r][v];
}

#define IN_REGISTERS ((WIDTH == 32 ? 12 : 24) / VECTORS) /* rows whose sums are */

#define ROWS(number)                                                                                             \
    if (number <= IN_REGISTERS)                                                                                  \
        while (rows >= number) {                                                                                 \
            NAME(multiply_rows)(number <= IN_REGISTERS ? number : 1, depth, a, a_row, w, out, add);              \
            rows -= number, a += number * a_row, out += number * BLOCK;                                          \
        }

/* out [rows, 16] (+)= a · w for up to 32 rows; with `w1` and `out1` a second block of columns, likewise. */
static void NAME(multiply)(struct worker *worker, int rows, size depth, const LOW *a, size a_row, const LOW *w, const LOW *w1, REAL *out,
                           REAL *out1, int add) {
#if defined(LOW_IS_BF16) && HAS_AMX
    if (amx_is_ready) {
        struct left left = {(const char *)a, a_row * 2, 64, 32 * a_row};
        multiply_tiles(worker, rows, depth / 32, left, (const char *)w, (const char *)w1, (char *)out, (char *)out1, 4 * BLOCK, add);
        return;
    }
#endif
    if (w1) {
        NAME(multiply)(worker, rows, depth, a, a_row, w1, NULL, out1, NULL, add);
    }
    ROWS(24)
    ROWS(20)
    ROWS(16)
    ROWS(12)
    ROWS(8)
    ROWS(6)
    ROWS(4)
    ROWS(3)
    ROWS(2)
    ROWS(1)
}

/* Weights of `gates` matrices, packed; see vdrop_pack_bf16. [columns / 16][gates][depth][16 columns] */
#ifndef LOW_IS_BF16
void NAME(vdrop_pack)(const REAL *from, size from_gate, size from_k, size from_n, size gates, size inputs, size columns, REAL *to, int threads) {
    size blocks = (columns + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (size block = 0; block < blocks; block++)
        for (size gate = 0; gate < gates; gate++) {
            REAL *out = to + (block * gates + gate) * inputs * BLOCK;
            const REAL *in = from + gate * from_gate + block * BLOCK * from_n;
            size wide = at_most(columns - block * BLOCK, BLOCK);
            for (size k = 0; k < inputs; k++)
                for (size n = 0; n < BLOCK; n++) out[k * BLOCK + n] = n < wide ? in[k * from_k + n * from_n] : 0;
        }
}
#endif

/* Steps of a recurrence */

static const REAL NAME(ones)[BLOCK] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

INLINE const REAL *NAME(mask_at)(const struct mask *mask, size t, size g, size b, size unit) {
    return mask->data ? (const REAL *)mask->data + t * mask->t + g * mask->g + b * mask->b + unit : NAME(ones);
}

struct NAME(step) {
    size t, rows, row, before; /* sequences that have it; the row of the first; the row of its state before, of [B + N] */
};

INLINE struct NAME(step) NAME(step_at)(const struct recurrence *p, size t) {
    struct NAME(step) step = {t, p->first[t + 1] - p->first[t], p->first[t], t ? p->batch + p->first[t - 1] : 0};
    return step;
}

INLINE LOW *NAME(inputs_at)(const struct recurrence *p, size t, size group, size row) {
    return (LOW *)p->inputs + (((t & 1) * p->groups + group) * p->batch + row) * p->depth;
}

/* What enters the products of step `t`: m ∘ h, for up to 16 units of a row. */
INLINE void NAME(write_inputs)(const struct recurrence *p, size t, size row, size unit, size units, const REAL *h) {
    for (size group = 0; group < p->groups; group++) {
        const REAL *m = NAME(mask_at)(&p->mask_h, t, group, row, unit);
        LOW *out = NAME(inputs_at)(p, t, group, row) + unit;
        for (size j = 0; j < units; j++) out[j] = NAME(lower)(h[j] * m[j]);
    }
}

/* A thread's part of a step: blocks of units, and of rows within them. */
struct NAME(part) {
    size item, end, row_blocks;
};

INLINE struct NAME(part) NAME(part_of)(const struct recurrence *p, size rows) {
    size row_blocks = (rows + MAX_ROWS - 1) / MAX_ROWS, items = (p->hidden + BLOCK - 1) / BLOCK * row_blocks;
    size thread = omp_get_thread_num(), threads = omp_get_num_threads();
    struct NAME(part) part = {share(items, thread, threads), share(items, thread + 1, threads), row_blocks};
    return part;
}

#define FOR_BLOCKS_OF(p, all_rows)                                                                                                 \
    for (struct NAME(part) part = NAME(part_of)(p, all_rows); part.item < part.end; part.item++)                                   \
        for (size unit = part.item / part.row_blocks * BLOCK, units = at_most((p)->hidden - unit, BLOCK),                          \
                  first_row = part.item % part.row_blocks * MAX_ROWS, rows = at_most((all_rows) - first_row, MAX_ROWS), once = 1;  \
             once; once = 0)

static void NAME(first_inputs)(const struct recurrence *p) {
    FOR_BLOCKS_OF(p, p->first[1]) {
        for (size r = first_row; r < first_row + rows; r++) NAME(write_inputs)(p, 0, r, unit, units, (const REAL *)p->h + r * p->hidden + unit);
    }
}

/* Recurrent products of `count` gates from `gate` on, of those that a block of units has: out [count][32][16]. */
static void NAME(gate_products)(const struct recurrence *p, struct worker *worker, size t, size first_row, size rows, size unit, size gate, size count,
                                size all_gates, REAL out[][MAX_ROWS * BLOCK]) {
    const LOW *w = (const LOW *)p->weights + (unit / BLOCK * all_gates + gate) * p->depth * BLOCK;
    for (size g = 0; g < count; g++, w += p->depth * BLOCK) {
        const LOW *a = NAME(inputs_at)(p, t, p->groups > 1 ? gate + g : 0, first_row);
        int two = p->groups == 1 && g + 1 < count;
        NAME(multiply)(worker, (int)rows, p->depth, a, p->depth, w, two ? w + p->depth * BLOCK : NULL, out[g], two ? out[g + 1] : NULL, 0);
        if (two) g++, w += p->depth * BLOCK;
    }
}

INLINE REAL *NAME(gate_at)(const struct recurrence *p, size row, size gate, size unit) {
    return (REAL *)p->gates + row * p->gate_row + gate * p->gate_stride + unit;
}

INLINE LOW *NAME(da_at)(const struct recurrence *p, size row, size gate, size unit) {
    return (LOW *)p->da + row * p->da_row + gate * p->da_stride + unit;
}

INLINE REAL *NAME(bias_sum)(const struct recurrence *p, size gates, size gate, size unit) {
    return (REAL *)p->bias_sums + (omp_get_thread_num() * (gates + 1) + gate) * p->hidden + unit;
}

/* Loops over up to 16 units, with the full number known to the compiler. */
#define FOR_UNITS(units, ...)                                                   \
    if ((units) == BLOCK) {                                                     \
        _Pragma("omp simd") for (int j = 0; j < BLOCK; j++) { __VA_ARGS__ }     \
    } else {                                                                    \
        for (int j = 0; j < (int)(units); j++) { __VA_ARGS__ }                  \
    }

void NAME(vdrop_lstm_forward)(const struct recurrence *p) {
#pragma omp parallel num_threads(p->threads)
    {
        struct worker worker = {0};
        REAL products[4][MAX_ROWS * BLOCK] __attribute__((aligned(64)));
        NAME(first_inputs)(p);
#pragma omp barrier
        for (size t = 0; t < p->steps; t++) {
            struct NAME(step) step = NAME(step_at)(p, t);
            FOR_BLOCKS_OF(p, step.rows) {
                NAME(gate_products)(p, &worker, t, first_row, rows, unit, 0, 4, 4, products);
                const REAL *bias = (const REAL *)p->bias + unit;
                for (size r = 0; r < rows; r++) {
                    size row = step.row + first_row + r, hidden = p->hidden;
                    REAL *restrict ai = NAME(gate_at)(p, row, 0, unit), *restrict af = NAME(gate_at)(p, row, 1, unit);
                    REAL *restrict ag = NAME(gate_at)(p, row, 2, unit), *restrict ao = NAME(gate_at)(p, row, 3, unit);
                    const REAL *restrict c_before = (const REAL *)p->c + (step.before + first_row + r) * hidden + unit;
                    REAL *restrict c = (REAL *)p->c + (p->batch + row) * hidden + unit, *restrict h = (REAL *)p->h + (p->batch + row) * hidden + unit;
                    REAL *restrict y = (REAL *)p->y + place_of(p, row) * hidden + unit;
                    const REAL *restrict m = NAME(mask_at)(&p->mask_c, t, 0, first_row + r, unit), *restrict s = products[0] + r * BLOCK;
                    enum { NEXT = MAX_ROWS * BLOCK };
                    FOR_UNITS(units, REAL i = NAME(sigmoid)(ai[j] + s[j] + bias[j]);
                              REAL f = NAME(sigmoid)(af[j] + s[NEXT + j] + bias[hidden + j]);
                              REAL g = NAME(hyperbolic)(ag[j] + s[2 * NEXT + j] + bias[2 * hidden + j]);
                              REAL o = NAME(sigmoid)(ao[j] + s[3 * NEXT + j] + bias[3 * hidden + j]);
                              REAL cell = (f * c_before[j] + i * g) * m[j], state = o * NAME(hyperbolic)(cell);
                              ai[j] = i; af[j] = f; ag[j] = g; ao[j] = o; c[j] = cell; h[j] = state; y[j] = state;)
                    if (t + 1 < p->steps) NAME(write_inputs)(p, t + 1, first_row + r, unit, units, h);
                }
            }
#pragma omp barrier
        }
        release_tiles(&worker);
    }
}

/* Gradient of what entered the products of step `t`: out [32][16] = Σ over gates of m_g ∘ (da_g · U_g), for gates 0 … count - 1. */
static void NAME(recurrent_gradient)(const struct recurrence *p, struct worker *worker, size t, size first_row, size rows, size unit, size units,
                                     size count, size all_gates, REAL *out) {
    const LOW *w = (const LOW *)p->weights + unit / BLOCK * all_gates * p->depth * BLOCK;
    REAL product[MAX_ROWS * BLOCK] __attribute__((aligned(64)));
    size row = p->first[t] + first_row;
    for (size gate = 0; gate < count; gate++) {
        int inner = gate == 2 && p->reset_after;
        const LOW *a = inner ? (const LOW *)p->da_inner + row * p->depth : NAME(da_at)(p, row, gate, 0);
        REAL *to = p->groups > 1 ? product : out;
        NAME(multiply)(worker, (int)rows, p->depth, a, inner ? p->depth : p->da_row, w + gate * p->depth * BLOCK, NULL, to, NULL, to == out && gate > 0);
        if (p->groups > 1)
            for (size r = 0; r < rows; r++) {
                const REAL *m = NAME(mask_at)(&p->mask_h, t, gate, first_row + r, unit);
                for (size j = 0; j < units; j++) out[r * BLOCK + j] = (gate ? out[r * BLOCK + j] : 0) + product[r * BLOCK + j] * m[j];
            }
    }
    if (p->groups == 1 && p->mask_h.data)
        for (size r = 0; r < rows; r++) {
            const REAL *m = NAME(mask_at)(&p->mask_h, t, 0, first_row + r, unit);
            for (size j = 0; j < units; j++) out[r * BLOCK + j] *= m[j];
        }
}

void NAME(vdrop_lstm_backward)(const struct recurrence *p) {
#pragma omp parallel num_threads(p->threads)
    {
        struct worker worker = {0};
        REAL product[MAX_ROWS * BLOCK] __attribute__((aligned(64)));
        for (size t = p->steps - 1; t >= -1; t--) {
            struct NAME(step) step = {t, p->batch, 0, 0};
            if (t >= 0) step = NAME(step_at)(p, t);
            size later = t + 1 < p->steps ? p->first[t + 2] - p->first[t + 1] : 0; /* sequences that have the step after this one */
            FOR_BLOCKS_OF(p, step.rows) {
                size have = later - first_row < 0 ? 0 : at_most(later - first_row, rows), hidden = p->hidden;
                if (have) NAME(recurrent_gradient)(p, &worker, t + 1, first_row, have, unit, units, 4, 4, product);
                REAL *bi = NAME(bias_sum)(p, 4, 0, unit), *bf = bi + hidden, *bg = bf + hidden, *bo = bg + hidden;
                for (size r = 0; r < rows; r++) {
                    REAL *restrict dh_end = (REAL *)p->dh + (first_row + r) * hidden + unit;
                    const REAL *restrict dh = r < have ? product + r * BLOCK : dh_end;
                    if (t < 0) {
                        if (r < have) memcpy(dh_end, dh, (size_t)units * sizeof(REAL));
                        continue;
                    }
                    size row = step.row + first_row + r;
                    const REAL *restrict yi = NAME(gate_at)(p, row, 0, unit), *restrict yf = NAME(gate_at)(p, row, 1, unit);
                    const REAL *restrict yg = NAME(gate_at)(p, row, 2, unit), *restrict yo = NAME(gate_at)(p, row, 3, unit);
                    const REAL *restrict c_before = (const REAL *)p->c + (step.before + first_row + r) * hidden + unit;
                    const REAL *restrict c = (const REAL *)p->c + (p->batch + row) * hidden + unit;
                    const REAL *restrict m = NAME(mask_at)(&p->mask_c, t, 0, first_row + r, unit);
                    const REAL *restrict dy = p->dy ? (const REAL *)p->dy + place_of(p, row) * hidden + unit : NULL;
                    const REAL *restrict dcells = p->dcells ? (const REAL *)p->dcells + place_of(p, row) * hidden + unit : NULL;
                    REAL *restrict dc = (REAL *)p->dc + (first_row + r) * hidden + unit;
                    LOW *restrict di = NAME(da_at)(p, row, 0, unit), *restrict df = NAME(da_at)(p, row, 1, unit);
                    LOW *restrict dg = NAME(da_at)(p, row, 2, unit), *restrict d_o = NAME(da_at)(p, row, 3, unit);
                    REAL upstream[BLOCK];
                    for (size j = 0; j < units; j++) upstream[j] = dh[j];
                    if (dy)
                        for (size j = 0; j < units; j++) upstream[j] += dy[j];
                    if (dcells)
                        for (size j = 0; j < units; j++) dc[j] += dcells[j];
                    FOR_UNITS(units, REAL i = yi[j]; REAL f = yf[j]; REAL g = yg[j]; REAL o = yo[j]; REAL tanh_c = NAME(hyperbolic)(c[j]);
                              REAL d_state = upstream[j]; REAL d_cell = (dc[j] + d_state * o * (1 - tanh_c * tanh_c)) * m[j];
                              REAL ai = d_cell * g * i * (1 - i); REAL af = d_cell * c_before[j] * f * (1 - f);
                              REAL ag = d_cell * i * (1 - g * g); REAL ao = d_state * tanh_c * o * (1 - o); dc[j] = d_cell * f;
                              di[j] = NAME(lower)(ai); df[j] = NAME(lower)(af); dg[j] = NAME(lower)(ag); d_o[j] = NAME(lower)(ao);
                              bi[j] += ai; bf[j] += af; bg[j] += ag; bo[j] += ao;)
                }
            }
#pragma omp barrier
        }
        release_tiles(&worker);
    }
}

void NAME(vdrop_gru_forward)(const struct recurrence *p) {
#pragma omp parallel num_threads(p->threads)
    {
        struct worker worker = {0};
        REAL products[3][MAX_ROWS * BLOCK] __attribute__((aligned(64)));
        NAME(first_inputs)(p);
#pragma omp barrier
        for (size t = 0; t < p->steps; t++) {
            struct NAME(step) step = NAME(step_at)(p, t);
            size hidden = p->hidden;
            FOR_BLOCKS_OF(p, step.rows) {
                NAME(gate_products)(p, &worker, t, first_row, rows, unit, 0, p->reset_after ? 3 : 2, 3, products);
                const REAL *bias = (const REAL *)p->bias + unit;
                for (size r = 0; r < rows; r++) {
                    size row = step.row + first_row + r;
                    REAL *restrict ar = NAME(gate_at)(p, row, 0, unit), *restrict az = NAME(gate_at)(p, row, 1, unit);
                    REAL *restrict an = NAME(gate_at)(p, row, 2, unit);
                    const REAL *restrict s = products[0] + r * BLOCK;
                    const REAL *restrict before = (const REAL *)p->h + (step.before + first_row + r) * hidden + unit;
                    enum { NEXT = MAX_ROWS * BLOCK };
                    FOR_UNITS(units, ar[j] = NAME(sigmoid)(ar[j] + s[j] + bias[j]); az[j] = NAME(sigmoid)(az[j] + s[NEXT + j] + bias[hidden + j]);)
                    if (!p->reset_after) {
                        const REAL *restrict m = NAME(mask_at)(&p->mask_h, t, p->groups > 1 ? 2 : 0, first_row + r, unit);
                        LOW *restrict out = (LOW *)p->inputs_n + (first_row + r) * p->depth + unit;
                        for (size j = 0; j < units; j++) out[j] = NAME(lower)(ar[j] * (before[j] * m[j]));
                        continue;
                    }
                    REAL *restrict inner = (REAL *)p->inner + row * hidden + unit, *restrict h = (REAL *)p->h + (p->batch + row) * hidden + unit;
                    REAL *restrict y = (REAL *)p->y + place_of(p, row) * hidden + unit;
                    const REAL *restrict bias_n = (const REAL *)p->bias_n + unit;
                    FOR_UNITS(units, REAL recurrent = s[2 * NEXT + j] + bias_n[j]; inner[j] = recurrent;
                              REAL n = NAME(hyperbolic)(an[j] + bias[2 * hidden + j] + ar[j] * recurrent);
                              REAL state = n + az[j] * (before[j] - n); an[j] = n; h[j] = state; y[j] = state;)
                    if (t + 1 < p->steps) NAME(write_inputs)(p, t + 1, first_row + r, unit, units, h);
                }
            }
#pragma omp barrier
            if (p->reset_after) continue;
            FOR_BLOCKS_OF(p, step.rows) {
                const LOW *w = (const LOW *)p->weights + (unit / BLOCK * 3 + 2) * p->depth * BLOCK;
                NAME(multiply)(&worker, (int)rows, p->depth, (const LOW *)p->inputs_n + first_row * p->depth, p->depth, w, NULL, products[0], NULL, 0);
                const REAL *restrict bias = (const REAL *)p->bias + 2 * hidden + unit;
                for (size r = 0; r < rows; r++) {
                    size row = step.row + first_row + r;
                    const REAL *restrict z = NAME(gate_at)(p, row, 1, unit), *restrict s = products[0] + r * BLOCK;
                    const REAL *restrict before = (const REAL *)p->h + (step.before + first_row + r) * hidden + unit;
                    REAL *restrict an = NAME(gate_at)(p, row, 2, unit), *restrict h = (REAL *)p->h + (p->batch + row) * hidden + unit;
                    REAL *restrict y = (REAL *)p->y + place_of(p, row) * hidden + unit;
                    FOR_UNITS(units, REAL n = NAME(hyperbolic)(an[j] + s[j] + bias[j]); REAL state = n + z[j] * (before[j] - n);
                              an[j] = n; h[j] = state; y[j] = state;)
                    if (t + 1 < p->steps) NAME(write_inputs)(p, t + 1, first_row + r, unit, units, h);
                }
            }
#pragma omp barrier
        }
        release_tiles(&worker);
    }
}

void NAME(vdrop_gru_backward)(const struct recurrence *p) {
#pragma omp parallel num_threads(p->threads)
    {
        struct worker worker = {0};
        REAL product[MAX_ROWS * BLOCK] __attribute__((aligned(64)));
        for (size t = p->steps - 1; t >= -1; t--) {
            struct NAME(step) step = {t, p->batch, 0, 0};
            if (t >= 0) step = NAME(step_at)(p, t);
            size later = t + 1 < p->steps ? p->first[t + 2] - p->first[t + 1] : 0, hidden = p->hidden;
            FOR_BLOCKS_OF(p, step.rows) {
                size have = later - first_row < 0 ? 0 : at_most(later - first_row, rows);
                if (have) NAME(recurrent_gradient)(p, &worker, t + 1, first_row, have, unit, units, p->reset_after ? 3 : 2, 3, product);
                REAL *br = NAME(bias_sum)(p, 3, 0, unit), *bz = br + hidden, *bn = bz + hidden, *b_inner = bn + hidden;
                for (size r = 0; r < rows; r++) {
                    REAL *restrict carried = (REAL *)p->dh + (first_row + r) * hidden + unit;
                    if (r < have)
                        for (size j = 0; j < units; j++) carried[j] += product[r * BLOCK + j];
                    if (t < 0) continue;
                    size row = step.row + first_row + r;
                    const REAL *restrict yr = NAME(gate_at)(p, row, 0, unit), *restrict yz = NAME(gate_at)(p, row, 1, unit);
                    const REAL *restrict yn = NAME(gate_at)(p, row, 2, unit);
                    const REAL *restrict before = (const REAL *)p->h + (step.before + first_row + r) * hidden + unit;
                    LOW *restrict dr = NAME(da_at)(p, row, 0, unit), *restrict dz = NAME(da_at)(p, row, 1, unit);
                    LOW *restrict dn = NAME(da_at)(p, row, 2, unit);
                    if (p->dy) {
                        const REAL *restrict dy = (const REAL *)p->dy + place_of(p, row) * hidden + unit;
                        for (size j = 0; j < units; j++) carried[j] += dy[j];
                    }
                    if (p->reset_after) {
                        const REAL *restrict inner = (const REAL *)p->inner + row * hidden + unit;
                        LOW *restrict d_inner = (LOW *)p->da_inner + row * p->depth + unit;
                        FOR_UNITS(units, REAL d = carried[j]; REAL z = yz[j]; REAL n = yn[j]; REAL reset = yr[j];
                                  REAL an = d * (1 - z) * (1 - n * n); REAL az = d * (before[j] - n) * z * (1 - z);
                                  REAL ar = an * inner[j] * reset * (1 - reset); REAL a_inner = an * reset; carried[j] = d * z;
                                  dr[j] = NAME(lower)(ar); dz[j] = NAME(lower)(az); dn[j] = NAME(lower)(an); d_inner[j] = NAME(lower)(a_inner);
                                  br[j] += ar; bz[j] += az; bn[j] += an; b_inner[j] += a_inner;)
                    } else {
                        FOR_UNITS(units, REAL d = carried[j]; REAL z = yz[j]; REAL n = yn[j]; REAL an = d * (1 - z) * (1 - n * n);
                                  REAL az = d * (before[j] - n) * z * (1 - z); carried[j] = d * z;
                                  dz[j] = NAME(lower)(az); dn[j] = NAME(lower)(an); bz[j] += az; bn[j] += an;)
                    }
                }
            }
#pragma omp barrier
            if (p->reset_after || t < 0) continue;
            FOR_BLOCKS_OF(p, step.rows) {
                const LOW *w = (const LOW *)p->weights + (unit / BLOCK * 3 + 2) * p->depth * BLOCK;
                NAME(multiply)(&worker, (int)rows, p->depth, NAME(da_at)(p, step.row + first_row, 2, 0), p->da_row, w, NULL, product, NULL, 0);
                REAL *restrict br = NAME(bias_sum)(p, 3, 0, unit);
                for (size r = 0; r < rows; r++) {
                    size row = step.row + first_row + r;
                    const REAL *restrict yr = NAME(gate_at)(p, row, 0, unit), *restrict s = product + r * BLOCK;
                    const REAL *restrict before = (const REAL *)p->h + (step.before + first_row + r) * hidden + unit;
                    const REAL *restrict m = NAME(mask_at)(&p->mask_h, t, p->groups > 1 ? 2 : 0, first_row + r, unit);
                    REAL *restrict carried = (REAL *)p->dh + (first_row + r) * hidden + unit;
                    LOW *restrict dr = NAME(da_at)(p, row, 0, unit);
                    FOR_UNITS(units, REAL d = s[j] * m[j]; REAL reset = yr[j]; REAL ar = d * before[j] * reset * (1 - reset);
                              carried[j] += d * reset; dr[j] = NAME(lower)(ar); br[j] += ar;)
                }
            }
#pragma omp barrier
        }
        release_tiles(&worker);
    }
}

/* Steps of the cells with layer norm: all but the products, a row for each sequence. Only in types that are not rounded. */
#ifndef LOW_IS_BF16

INLINE void NAME(moments)(const REAL *x, size count, REAL *mean, REAL *rstd) {
    REAL sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (size j = 0; j < count; j++) sum += x[j];
    REAL average = sum / count;
#pragma omp simd reduction(+ : squares)
    for (size j = 0; j < count; j++) squares += (x[j] - average) * (x[j] - average);
    *mean = average;
    *rstd = 1 / (REAL)sqrt((double)(squares / count) + 1e-5);
}

/* dx = rstd (dy g - mean(dy g) - x^ mean(dy g x^)), written to, or added to, `dx`. */
INLINE void NAME(norm_backward)(const REAL *restrict x, const REAL *restrict gain, REAL mean, REAL rstd, const REAL *restrict dy, size count, int add,
                                REAL *restrict dx) {
    REAL sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
    for (size j = 0; j < count; j++) {
        REAL d = dy[j] * gain[j];
        sum += d;
        product += d * (x[j] - mean) * rstd;
    }
    sum /= count;
    product /= count;
#pragma omp simd
    for (size j = 0; j < count; j++) {
        REAL d = rstd * (dy[j] * gain[j] - sum - (x[j] - mean) * rstd * product);
        dx[j] = add ? dx[j] + d : d;
    }
}

/* gates [B, 4H]: the normalised input products, and afterwards the gates; u [B, 4H] the recurrent products. */
void NAME(vdrop_norm_lstm)(REAL *gates, const REAL *u, const REAL *gain, const REAL *gain_c, const REAL *bias_c, const REAL *mask, size mask_row,
                           const REAL *c_before, REAL *c, REAL *h, REAL *tanh_c, REAL *mean_u, REAL *rstd_u, REAL *mean_c, REAL *rstd_c, size rows,
                           size hidden, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size r = 0; r < rows; r++) {
        REAL *restrict a = gates + r * 4 * hidden, *restrict cell = c + r * hidden, *restrict state = h + r * hidden, *restrict shown = tanh_c + r * hidden;
        const REAL *restrict x = u + r * 4 * hidden, *restrict before = c_before + r * hidden;
        NAME(moments)(x, 4 * hidden, mean_u + r, rstd_u + r);
        REAL m = mean_u[r], s = rstd_u[r];
#pragma omp simd
        for (size j = 0; j < hidden; j++) {
            size jf = hidden + j, jg = 2 * hidden + j, jo = 3 * hidden + j;
            REAL i = NAME(sigmoid)(a[j] + (x[j] - m) * s * gain[j]), f = NAME(sigmoid)(a[jf] + (x[jf] - m) * s * gain[jf]);
            REAL g = NAME(hyperbolic)(a[jg] + (x[jg] - m) * s * gain[jg]), o = NAME(sigmoid)(a[jo] + (x[jo] - m) * s * gain[jo]);
            cell[j] = f * before[j] + i * g;
            a[j] = i; a[jf] = f; a[jg] = g; a[jo] = o;
        }
        if (mask)
            for (size j = 0; j < hidden; j++) cell[j] *= mask[r * mask_row + j];
        NAME(moments)(cell, hidden, mean_c + r, rstd_c + r);
        m = mean_c[r], s = rstd_c[r];
#pragma omp simd
        for (size j = 0; j < hidden; j++) {
            shown[j] = NAME(hyperbolic)((cell[j] - m) * s * gain_c[j] + bias_c[j]);
            state[j] = a[3 * hidden + j] * shown[j];
        }
    }
}

/* dc [B, H]: the gradient of c, and afterwards that of c before; da and du [B, 4H], dn [B, H] that of the normalised c. */
void NAME(vdrop_norm_lstm_backward)(const REAL *gates, const REAL *u, const REAL *gain, const REAL *gain_c, const REAL *mask, size mask_row,
                                    const REAL *c_before, const REAL *c, const REAL *tanh_c, const REAL *mean_u, const REAL *rstd_u,
                                    const REAL *mean_c, const REAL *rstd_c, const REAL *dh, REAL *dc, const REAL *dcells, REAL *da, REAL *du, REAL *dn,
                                    size rows, size hidden, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size r = 0; r < rows; r++) {
        const REAL *restrict a = gates + r * 4 * hidden, *restrict shown = tanh_c + r * hidden, *restrict up = dh + r * hidden;
        const REAL *restrict before = c_before + r * hidden;
        REAL *restrict d_cell = dc + r * hidden, *restrict d = da + r * 4 * hidden, *restrict d_shown = dn + r * hidden;
#pragma omp simd
        for (size j = 0; j < hidden; j++) {
            REAL o = a[3 * hidden + j];
            d_shown[j] = up[j] * o * (1 - shown[j] * shown[j]);
            d[3 * hidden + j] = up[j] * shown[j] * o * (1 - o);
        }
        NAME(norm_backward)(c + r * hidden, gain_c, mean_c[r], rstd_c[r], d_shown, hidden, 1, d_cell);
        if (dcells)
            for (size j = 0; j < hidden; j++) d_cell[j] += dcells[r * hidden + j];
        if (mask)
            for (size j = 0; j < hidden; j++) d_cell[j] *= mask[r * mask_row + j];
#pragma omp simd
        for (size j = 0; j < hidden; j++) {
            REAL i = a[j], f = a[hidden + j], g = a[2 * hidden + j], w = d_cell[j];
            d[j] = w * g * i * (1 - i);
            d[hidden + j] = w * before[j] * f * (1 - f);
            d[2 * hidden + j] = w * i * (1 - g * g);
            d_cell[j] = w * f;
        }
        NAME(norm_backward)(u + r * 4 * hidden, gain, mean_u[r], rstd_u[r], d, 4 * hidden, 0, du + r * 4 * hidden);
    }
}

/* rz [B, 2H]: the normalised input products, and afterwards the gates. */
void NAME(vdrop_norm_gru_gates)(REAL *rz, const REAL *u, const REAL *gain, REAL *mean, REAL *rstd, size rows, size hidden, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size r = 0; r < rows; r++) {
        REAL *restrict a = rz + r * 2 * hidden;
        const REAL *restrict x = u + r * 2 * hidden;
        NAME(moments)(x, 2 * hidden, mean + r, rstd + r);
        REAL m = mean[r], s = rstd[r];
#pragma omp simd
        for (size j = 0; j < 2 * hidden; j++) a[j] = NAME(sigmoid)(a[j] + (x[j] - m) * s * gain[j]);
    }
}

/* n [B, H]: the normalised input products, and afterwards the candidate; v the normalised recurrent ones, inside the reset gate or not. */
void NAME(vdrop_norm_gru_candidate)(REAL *n, const REAL *u, const REAL *gain, const REAL *bias, const REAL *rz, const REAL *h_before, REAL *v, REAL *h,
                                    REAL *mean, REAL *rstd, size rows, size hidden, size reset_after, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size r = 0; r < rows; r++) {
        REAL *restrict a = n + r * hidden, *restrict inner = v + r * hidden, *restrict state = h + r * hidden;
        const REAL *restrict x = u + r * hidden, *restrict reset = rz + r * 2 * hidden, *restrict before = h_before + r * hidden;
        NAME(moments)(x, hidden, mean + r, rstd + r);
        REAL m = mean[r], s = rstd[r];
#pragma omp simd
        for (size j = 0; j < hidden; j++) {
            REAL recurrent = (x[j] - m) * s * gain[j] + bias[j];
            REAL candidate = NAME(hyperbolic)(a[j] + (reset_after ? reset[j] * recurrent : recurrent));
            inner[j] = recurrent;
            a[j] = candidate;
            state[j] = candidate + reset[hidden + j] * (before[j] - candidate);
        }
    }
}

/* dh [B, H]: the gradient of h, and afterwards what comes of it to h before through z alone. */
void NAME(vdrop_norm_gru_candidate_backward)(const REAL *rz, const REAL *n, const REAL *v, const REAL *u, const REAL *gain, const REAL *mean,
                                             const REAL *rstd, const REAL *h_before, REAL *dh, REAL *da_n, REAL *dv, REAL *da_rz, REAL *du, size rows,
                                             size hidden, size reset_after, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size r = 0; r < rows; r++) {
        const REAL *restrict reset = rz + r * 2 * hidden, *restrict z = reset + hidden, *restrict candidate = n + r * hidden;
        const REAL *restrict inner = v + r * hidden, *restrict before = h_before + r * hidden;
        REAL *restrict d = dh + r * hidden, *restrict dn = da_n + r * hidden, *restrict d_inner = dv + r * hidden;
        REAL *restrict dr = da_rz + r * 2 * hidden, *restrict dz = dr + hidden;
#pragma omp simd
        for (size j = 0; j < hidden; j++) {
            REAL an = d[j] * (1 - z[j]) * (1 - candidate[j] * candidate[j]);
            dz[j] = d[j] * (before[j] - candidate[j]) * z[j] * (1 - z[j]);
            dr[j] = reset_after ? an * inner[j] * reset[j] * (1 - reset[j]) : 0;
            d_inner[j] = reset_after ? an * reset[j] : an;
            dn[j] = an;
            d[j] = d[j] * z[j];
        }
        NAME(norm_backward)(u + r * hidden, gain, mean[r], rstd[r], d_inner, hidden, 0, du + r * hidden);
    }
}

/* entered [B, H]: the gradient of m h, or of r m h, times m. */
void NAME(vdrop_norm_gru_gates_backward)(const REAL *rz, const REAL *u, const REAL *gain, const REAL *mean, const REAL *rstd, const REAL *h_before,
                                         const REAL *entered, REAL *dh, REAL *da_rz, REAL *du, size rows, size hidden, size reset_after, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size r = 0; r < rows; r++) {
        const REAL *restrict reset = rz + r * 2 * hidden, *restrict before = h_before + r * hidden, *restrict e = entered + r * hidden;
        REAL *restrict d = dh + r * hidden, *restrict dr = da_rz + r * 2 * hidden;
#pragma omp simd
        for (size j = 0; j < hidden; j++) {
            d[j] += reset_after ? e[j] : e[j] * reset[j];
            dr[j] = reset_after ? dr[j] : e[j] * before[j] * reset[j] * (1 - reset[j]);
        }
        NAME(norm_backward)(u + r * 2 * hidden, gain, mean[r], rstd[r], dr, 2 * hidden, 0, du + r * 2 * hidden);
    }
}
#endif

/* The head: of each row of logits [rows, V] (bias not yet added) the negative log-likelihood of its target; with `d` the gradient of
   the logits, times that of the row where `upstream` is not NULL, rounded to LOW, and its sum over the rows in sums [threads, V], zeros.
   `logits` is overwritten; `d` may be the same memory where LOW is REAL. */
void NAME(vdrop_softmax)(REAL *logits, size rows, size words, const REAL *bias, const int64_t *targets, const REAL *upstream, REAL *nll, LOW *d,
                         size d_row, REAL *sums, int threads) {
#pragma omp parallel num_threads(threads)
    {
        size thread = omp_get_thread_num(), all = omp_get_num_threads();
        REAL *restrict my_sums = sums + thread * words;
        for (size n = share(rows, thread, all); n < share(rows, thread + 1, all); n++) {
            REAL *x = logits + n * words, largest = -INFINITY, total = 0;
#pragma omp simd reduction(max : largest)
            for (size v = 0; v < words; v++) {
                x[v] += bias[v];
                largest = x[v] > largest ? x[v] : largest;
            }
            REAL target = x[targets[n]];
#pragma omp simd reduction(+ : total)
            for (size v = 0; v < words; v++) {
                x[v] = NAME(exponential)(x[v] - largest);
                total += x[v];
            }
            nll[n] = (REAL)log(total) - (target - largest);
            if (!d) continue;
            REAL scale = upstream ? upstream[n] : 1, factor = scale / total;
            LOW *out = d + n * d_row; /* may be `x` */
            REAL at_target = x[targets[n]] * factor - scale;
#pragma omp simd
            for (size v = 0; v < words; v++) {
                REAL gradient = x[v] * factor;
                out[v] = NAME(lower)(gradient);
                my_sums[v] += gradient;
            }
            out[targets[n]] = NAME(lower)(at_target);
            my_sums[targets[n]] -= scale;
            for (size v = words; v < d_row; v++) out[v] = 0;
        }
    }
}

#undef ROUNDING
#undef MANTISSA
#undef BIAS
#undef LIMIT
#undef LN2_HIGH
#undef LN2_LOW
#undef LANES
#undef VECTORS
#undef IN_REGISTERS
#undef ROWS
#undef FOR_BLOCKS_OF
#undef FOR_UNITS

#endif
