/* Preloaded into slurmctld alone, by `slurm/cluster up --fast-signals`.
 *
 * slurmctld looks every 30 s for jobs to warn (--signal) or to end (--time), and asks difftime() whether it is
 * time again. Told that 30 s have passed as soon as 2 s have, it looks every 2 s. All longer times stay true,
 * so timeouts in slurm.conf have to be longer than 30 s.
 */
#include <time.h>

double difftime(time_t later, time_t earlier) {
    double seconds = (double)(later - earlier);
    return seconds >= 2 && seconds < 30 ? 30 : seconds;
}
