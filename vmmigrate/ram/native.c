/* Page digests at memory speed; what a digest is, is said in digest.py, which computes the same without this.
 *
 * With x = low half + 2^32 high half, and the weights a and b split likewise, modulo 2^64:
 *
 *     x a + (x >> 32) b  =  low a_low + high b_low  +  2^32 (low a_high + high (a_low + b_high))
 *
 * so that processors whose vectors multiply 32 bits by 32 need three multiplications for four words at a time, and of
 * the last term only the lower 32 bits.
 */
#include <stddef.h>
#include <stdint.h>

#define WORDS 512 /* of a page */

/* Each entry of a_low and b_low is below 2^32; upper holds (a_high, a_low + b_high) modulo 2^32 for each word. */
struct weights {
    uint64_t a_low[WORDS];
    uint64_t b_low[WORDS];
    uint32_t upper[2 * WORDS];
};

static uint64_t digest(const uint64_t *page, const struct weights *w, uint64_t *any)
{
    uint64_t sum = 0, bits = 0;
    uint32_t upper = 0;
    for (size_t i = 0; i < WORDS; i++) {
        uint32_t low = (uint32_t)page[i], high = (uint32_t)(page[i] >> 32);
        sum += low * w->a_low[i] + high * w->b_low[i];
        upper += low * w->upper[2 * i] + high * w->upper[2 * i + 1];
        bits |= page[i];
    }
    *any = bits;
    return sum + ((uint64_t)upper << 32);
}

#ifdef __x86_64__
#include <immintrin.h>

__attribute__((target("avx2"))) static uint64_t digest_avx2(const uint64_t *page, const struct weights *w, uint64_t *any)
{
    __m256i low = _mm256_setzero_si256(), high = low, upper = low, bits = low;
    for (size_t i = 0; i < WORDS; i += 4) {
        __m256i x = _mm256_loadu_si256((const __m256i *)(page + i));
        low = _mm256_add_epi64(low, _mm256_mul_epu32(x, *(const __m256i_u *)(w->a_low + i)));
        high = _mm256_add_epi64(high, _mm256_mul_epu32(_mm256_srli_epi64(x, 32), *(const __m256i_u *)(w->b_low + i)));
        upper = _mm256_add_epi32(upper, _mm256_mullo_epi32(x, *(const __m256i_u *)(w->upper + 2 * i)));
        bits = _mm256_or_si256(bits, x);
    }
    uint64_t sums[4], words[4];
    uint32_t uppers[8], carried = 0;
    _mm256_storeu_si256((__m256i *)sums, _mm256_add_epi64(low, high));
    _mm256_storeu_si256((__m256i *)uppers, upper);
    _mm256_storeu_si256((__m256i *)words, bits);
    for (size_t i = 0; i < 8; i++)
        carried += uppers[i];
    *any = words[0] | words[1] | words[2] | words[3];
    return sums[0] + sums[1] + sums[2] + sums[3] + ((uint64_t)carried << 32);
}
#endif

/* The digests of `count` pages of `ram`, and which of them hold anything but zeros: pages `numbers`, or, when that is
 * NULL, the first ones. `ram` may be written meanwhile; a page is then judged by what was read. */
void vmmigrate_digest_pages(const uint64_t *ram, const int64_t *numbers, size_t count, const struct weights *w,
                            uint64_t *digests, uint8_t *nonzero)
{
    uint64_t (*one)(const uint64_t *, const struct weights *, uint64_t *) = digest;
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2"))
        one = digest_avx2;
#endif
    for (size_t n = 0; n < count; n++) {
        uint64_t any;
        digests[n] = one(ram + WORDS * (numbers ? (size_t)numbers[n] : n), w, &any);
        nonzero[n] = any != 0;
    }
}
