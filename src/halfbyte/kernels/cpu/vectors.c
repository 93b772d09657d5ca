// The look-up tables of vectors.h, filled when the library is loaded.

#include "vectors.h"

bf16 hb_e4m3_words[256];
uint8_t hb_e4m3_high[128], hb_e4m3_low[128];
bf16 hb_e2m1_words[32];

__attribute__((constructor)) static void fill_tables(void) {
    static const float e2m1[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
    for (int code = 0; code < 128; code++) {
        bf16 word = e4m3_magnitude(code);
        hb_e4m3_words[code] = word;
        hb_e4m3_words[code + 128] = word | 0x8000;
        hb_e4m3_high[code] = (uint8_t)(word >> 8);
        hb_e4m3_low[code] = (uint8_t)word;
    }
    for (int i = 0; i < 32; i++)
        hb_e2m1_words[i] = float_to_bf16(e2m1[i & 7]) | (i & 8 ? 0x8000 : 0);
}
