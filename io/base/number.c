/* Exact numbers from text and back.
 * Refuses trailing characters, and never rounds an integer or a fraction. */
#include "io/base/number.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned __int128 u128;

/* magnitude * 10^exponent, magnitude without trailing zeros, so that "0.10000" and "0.1" are one. */
typedef struct {
    bool negative;
    u128 magnitude;
    int exponent;
} scientific;

static bool is_digit(char c) {
    return c >= '0' && c <= '9';
}

/* [+-] digits [. digits] [e [+-] digits]; returns what follows, or NULL if there is no number or it has over 36 significant digits.
 */
static const char *scan(const char *p, scientific *out) {
    const u128 limit = (u128)1 << 120;
    *out = (scientific){.negative = *p == '-'};
    if (*p == '-' || *p == '+') {
        p++;
    }
    bool any = false, point = false;
    int zeros = 0; /* digits 0 seen since the last other digit: they count only if another follows */
    for (;; p++) {
        if (*p == '.' && !point) {
            point = true;
            continue;
        }
        if (!is_digit(*p)) {
            break;
        }
        any = true;
        if (out->exponent < -100000 || zeros > 100000) {
            return NULL;
        }
        out->exponent -= point;
        zeros++;
        if (*p != '0') {
            for (; zeros > 0 && out->magnitude < limit / 10; zeros--) {
                out->magnitude *= 10;
            }
            if (zeros > 0 && out->magnitude > 0) {
                return NULL;
            }
            zeros = 0;
            out->magnitude += (u128)(*p - '0');
        }
    }
    out->exponent += zeros;
    if (!any) {
        return NULL;
    }
    if (*p == 'e' || *p == 'E') {
        const char *q = p + 1;
        bool minus = *q == '-';
        if (*q == '-' || *q == '+') {
            q++;
        }
        if (!is_digit(*q)) {
            return NULL;
        }
        int power = 0;
        for (; is_digit(*q); q++) {
            power = power < 100000 ? power * 10 + (*q - '0') : power;
        }
        out->exponent += minus ? -power : power;
        p = q;
    }
    if (out->magnitude == 0) {
        out->exponent = 0;
    }
    return p;
}

static u128 gcd(u128 a, u128 b) {
    while (b != 0) {
        u128 rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

/* s * factor as num / den in lowest terms, both below 2^126; false without room. */
static bool to_fraction(scientific s, uint64_t factor, u128 *num, u128 *den) {
    *num = s.magnitude;
    *den = 1;
    if (__builtin_mul_overflow(*num, (u128)factor, num)) {
        return false;
    }
    for (; s.exponent > 0; s.exponent--) {
        if (__builtin_mul_overflow(*num, (u128)10, num)) {
            return false;
        }
    }
    for (; s.exponent < 0; s.exponent++) { /* dividing first keeps 1e18 * 1e-18 in range */
        u128 common = gcd(*num, 10);
        *num /= common;
        if (__builtin_mul_overflow(*den, 10 / common, den)) {
            return false;
        }
    }
    u128 common = gcd(*num, *den);
    *num /= common;
    *den /= common;
    return true;
}

bool cpl_number_integer(const char *text, int64_t *out) {
    static const struct {
        const char *name;
        uint64_t factor;
    } suffix[] = {{"", 1},           {"k", 1000},        {"K", 1000},        {"M", 1000000},
                  {"G", 1000000000}, {"Ki", 1ULL << 10}, {"ki", 1ULL << 10}, {"Mi", 1ULL << 20},
                  {"Gi", 1ULL << 30}};
    scientific s;
    const char *rest = scan(text, &s);
    for (size_t i = 0; rest != NULL && i < sizeof suffix / sizeof *suffix; i++) {
        u128 num, den;
        if (strcmp(rest, suffix[i].name) != 0) {
            continue;
        }
        if (!to_fraction(s, suffix[i].factor, &num, &den) || den != 1 || num > (u128)INT64_MAX + s.negative) {
            return false;
        }
        *out = s.negative ? (int64_t)(0 - (uint64_t)num) : (int64_t)num;
        return true;
    }
    return false;
}

bool cpl_number_decimal(const char *text, cpl_decimal *out) {
    scientific s, below;
    u128 num = 0, den = 1;
    const char *rest = scan(text, &s);
    if (rest == NULL) {
        return false;
    }
    if (*rest == '/') {
        u128 a, b, c, d;
        const char *end = is_digit(rest[1]) ? scan(rest + 1, &below) : NULL;
        if (end == NULL || *end != '\0' || below.magnitude == 0 || !to_fraction(s, 1, &a, &b) || !to_fraction(below, 1, &c, &d)) {
            return false;
        }
        u128 ac = gcd(a, c), bd = gcd(b, d); /* (a/b) / (c/d) = (a d) / (b c) */
        if (__builtin_mul_overflow(a / ac, d / bd, &num) || __builtin_mul_overflow(b / bd, c / ac, &den)) {
            return false;
        }
    } else {
        bool percent = *rest == '%';
        s.exponent -= percent && s.magnitude > 0 ? 2 : 0;
        if (rest[percent] != '\0' || !to_fraction(s, 1, &num, &den)) {
            return false;
        }
    }
    if (num > INT64_MAX || den > INT64_MAX) {
        return false;
    }
    *out = (cpl_decimal){s.negative ? -(int64_t)num : (int64_t)num, (int64_t)den};
    return true;
}

bool cpl_number_real(const char *text, double *out) {
    size_t n = strspn(text, "0123456789+-.eE");
    char *end;
    if (n == 0 || text[n] != '\0') {
        return false;
    }
    double value = strtod(text, &end);
    if (*end != '\0' || !isfinite(value) || (value == 0 && strcspn(text, "123456789") < strcspn(text, "eE"))) {
        return false;
    }
    *out = value;
    return true;
}

void cpl_number_real_text(double value, char out[CPL_NUMBER_TEXT]) {
    for (int digits = 1; digits <= 17; digits++) { /* 17 always suffice for a double: IEEE 754-2008, 5.12.2 */
        snprintf(out, CPL_NUMBER_TEXT, "%.*g", digits, value);
        if (strtod(out, NULL) == value) {
            return;
        }
    }
}

void cpl_number_decimal_text(cpl_decimal v, char out[CPL_NUMBER_TEXT]) {
    __int128 scaled = v.num;
    int64_t power = 1;
    int places = 0;
    while (places < 18 && v.den > 0 && power % v.den != 0) {
        power *= 10;
        places++;
    }
    if (v.den <= 0 || power % v.den != 0) {
        snprintf(out, CPL_NUMBER_TEXT, "%lld/%lld", (long long)v.num, (long long)v.den);
        return;
    }
    scaled = (scaled < 0 ? -scaled : scaled) * (power / v.den);
    const long long whole = (long long)(scaled / power), part = (long long)(scaled % power);
    if (places == 0) {
        snprintf(out, CPL_NUMBER_TEXT, "%s%lld", v.num < 0 ? "-" : "", whole);
    } else {
        snprintf(out, CPL_NUMBER_TEXT, "%s%lld.%0*lld", v.num < 0 ? "-" : "", whole, places, part);
    }
}
