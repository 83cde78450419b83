/* Linked into programs of sanitizer builds: libraries that MPI opened at run time stay mapped, so that a leak of theirs still has a
 * name that lsan.supp can list when leaks are counted at the end. Refuses to unload anything. */
#include <dlfcn.h>

int dlclose(void *handle) {
    return 0;
}
