# Reads sources (paths relative to the root) and prints every line that goes against the arrows of the rooms.
# Refuses to guess: an include in quotes that names no known room is printed too.

function room(path) {
    if (path ~ /^io\/base\//) return "io/base"
    if (path ~ /^(io|kernels|comm|jobs)\//) return substr(path, 1, index(path, "/") - 1)
    return ""
}
function bad(why) {
    print FILENAME ":" FNR ": " why ": " $0
}
BEGIN {
    split("io/base>io/base io>io io>io/base kernels>kernels kernels>io/base comm>comm comm>kernels comm>io/base " \
          "jobs>jobs jobs>comm jobs>kernels jobs>io jobs>io/base", arrows, " ")
    for (i in arrows) allowed[arrows[i]] = 1
}
/^[ \t]*#[ \t]*include[ \t]*"/ {
    split($0, part, "\"")
    from = room(FILENAME)
    to = room(part[2])
    if (part[2] == "cupel_version.h") next
    if (to == "") bad("include is not relative to the root")
    else if (!((from ">" to) in allowed)) bad(from " may not look into " to)
    else if (part[2] ~ /^kernels\/(cpu|cuda)\// && from != "kernels") bad("only kernels may know its back ends")
}
/^[ \t]*#[ \t]*include[ \t]*<mpi\.h>/ && FILENAME !~ /^comm\// { bad("MPI is spoken in comm only") }
/^[ \t]*#[ \t]*include[ \t]*<(hdf5|H5).*>/ && FILENAME !~ /^io\/[^\/]*$/ { bad("HDF5 is spoken in io only") }
/^[ \t]*#[ \t]*include[ \t]*<yaml\.h>/ && FILENAME !~ /^io\/[^\/]*$/ { bad("YAML is spoken in io only") }
/^[ \t]*#[ \t]*include[ \t]*<(cuda|cublas|cudnn|nccl|nvml)/ && FILENAME !~ /^(kernels\/cuda\/|comm\/nccl\.c)/ { bad("CUDA is spoken in kernels/cuda and comm/nccl.c only") }
/^[ \t]*#[ \t]*(if|ifdef|ifndef|elif)[ \t(].*(CUDA|NCCL|NVCC)/ && FILENAME !~ /^(kernels\/cuda\/|comm\/nccl\.c)/ { bad("no CUDA conditional outside kernels/cuda and comm/nccl.c") }
