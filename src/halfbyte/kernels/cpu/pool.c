// Threads that wait for work by spinning briefly, then sleeping.
//
// Threads take items one by one from a phase's counter, and a phase ends when its items are done,
// not when every thread has come by: on a busy machine a thread that wakes late holds nobody up.
// One job runs at a time; a second caller meanwhile does its job alone. Results never depend on
// who ran what, since items are independent and of fixed extent.

#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define MAX_WORKERS 255
#define SPINS 4000        // some 50 to 100 microseconds: longer than the host takes between two calls
#define CALLER_SPINS 2000 // then the caller yields its core to whoever holds the last item

typedef struct {
    const hb_phase *phases;
    int num_phases;
    const void *context;
    atomic_int next[HB_MAX_PHASES];
    atomic_int done[HB_MAX_PHASES];
} job;

static struct {
    pthread_mutex_t owner;       // held by the caller whose job runs
    pthread_mutex_t mutex;       // guards sleeping
    pthread_cond_t wake;
    atomic_uint generation;      // counts jobs
    atomic_int num_sleeping;
    atomic_int num_inside;       // workers that may be reading `current`
    _Atomic(job *) current;
    int num_workers;             // grown by the owner only
    atomic_int num_wanted;       // workers that may take part in the current job
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER,
          .mutex = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER};

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void take_part(job *shared) {
    for (int p = 0; p < shared->num_phases; p++) {
        const hb_phase *phase = &shared->phases[p];
        int item;
        while ((item = atomic_fetch_add(&shared->next[p], 1)) < phase->num_items) {
            phase->work(shared->context, item);
            atomic_fetch_add(&shared->done[p], 1);
        }
        for (int spins = 0; atomic_load(&shared->done[p]) < phase->num_items; spins++) {
            if (spins < CALLER_SPINS) pause_briefly();
            else sched_yield();
        }
    }
}

static unsigned wait_for_work(unsigned seen) {
    for (int spins = 0; spins < SPINS; spins++) {
        unsigned now = atomic_load(&pool.generation);
        if (now != seen) return now;
        pause_briefly();
    }
    pthread_mutex_lock(&pool.mutex);
    atomic_fetch_add(&pool.num_sleeping, 1);
    while (atomic_load(&pool.generation) == seen) pthread_cond_wait(&pool.wake, &pool.mutex);
    atomic_fetch_sub(&pool.num_sleeping, 1);
    pthread_mutex_unlock(&pool.mutex);
    return atomic_load(&pool.generation);
}

static void *worker(void *argument) {
    int index = (int)(intptr_t)argument;
    unsigned seen = 0;
    for (;;) {
        seen = wait_for_work(seen);
        atomic_fetch_add(&pool.num_inside, 1);
        job *shared = atomic_load(&pool.current);
        if (shared != NULL && index < atomic_load(&pool.num_wanted)) take_part(shared);
        atomic_fetch_sub(&pool.num_inside, 1);
    }
    return NULL;
}

// After fork only the forking thread lives in the child; it starts workers of its own.
static void forget_workers(void) {
    pthread_mutex_init(&pool.owner, NULL);
    pthread_mutex_init(&pool.mutex, NULL);
    pthread_cond_init(&pool.wake, NULL);
    atomic_store(&pool.num_sleeping, 0);
    atomic_store(&pool.num_inside, 0);
    atomic_store(&pool.current, NULL);
    pool.num_workers = 0;
}

__attribute__((constructor)) static void watch_forks(void) {
    pthread_atfork(NULL, NULL, forget_workers);
}

static void grow(int num_wanted) {
    if (num_wanted > MAX_WORKERS) num_wanted = MAX_WORKERS;
    while (pool.num_workers < num_wanted) {
        pthread_t thread;
        void *index = (void *)(intptr_t)pool.num_workers;
        if (pthread_create(&thread, NULL, worker, index) != 0) return;
        pthread_detach(thread);
        pool.num_workers++;
    }
}

static void run_alone(const hb_phase *phases, int num_phases, const void *context) {
    for (int p = 0; p < num_phases; p++)
        for (int item = 0; item < phases[p].num_items; item++) phases[p].work(context, item);
}

void hb_run(const hb_phase *phases, int num_phases, const void *context, int num_threads) {
    if (num_threads <= 1 || pthread_mutex_trylock(&pool.owner) != 0) {
        run_alone(phases, num_phases, context);
        return;
    }
    grow(num_threads - 1);
    job shared = {.phases = phases, .num_phases = num_phases, .context = context};
    atomic_store(&pool.num_wanted, num_threads - 1);
    atomic_store(&pool.current, &shared);
    atomic_fetch_add(&pool.generation, 1);
    if (atomic_load(&pool.num_sleeping) > 0) {
        pthread_mutex_lock(&pool.mutex);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.mutex);
    }
    take_part(&shared);
    // `shared` lives on this stack: nobody may still be reading it when this returns.
    atomic_store(&pool.current, NULL);
    for (int spins = 0; atomic_load(&pool.num_inside) > 0; spins++) {
        if (spins < CALLER_SPINS) pause_briefly();
        else sched_yield();
    }
    pthread_mutex_unlock(&pool.owner);
}
