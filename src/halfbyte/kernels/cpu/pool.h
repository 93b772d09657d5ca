// A small pool of threads that share jobs of several phases; see pool.c.

#ifndef HALFBYTE_POOL_H
#define HALFBYTE_POOL_H

#define HB_MAX_PHASES 8

typedef void (*hb_work)(const void *context, int item);

typedef struct {
    hb_work work;
    int num_items;
} hb_phase;

// Run every item of every phase; a phase begins when all items of the one before are done. Items
// run in any order, on up to `num_threads` threads, the caller's among them. Returns when all are done.
void hb_run(const hb_phase *phases, int num_phases, const void *context, int num_threads);

#endif
