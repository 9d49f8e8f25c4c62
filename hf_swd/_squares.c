/* Squared norms of float32 arrays, read at the speed of memory.

   One core waits for memory when it reads a single stream of addresses: the hardware prefetcher stops at every page. Several streams
   at once hide that. Sums of RUN products are kept in float32, each of them in an accumulator of its own, and added up in float64: the
   relative error is below RUN * 2^-24, 1e-6, whatever the values are. */

#include <Python.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { STREAMS = 4, LANES = 4, RUN = 16, BLOCK = RUN * LANES, AHEAD = 256 };

/* Vectors of 16 bytes are native to every x86-64 and ARM64; wider ones would not read memory any faster. */
typedef float floats __attribute__((vector_size(LANES * sizeof(float))));
typedef double doubles __attribute__((vector_size(LANES * sizeof(double))));

static inline floats load(const float *address)
{
    floats value;
    memcpy(&value, address, sizeof value);
    return value;
}

static double squared_norm(const float *x, ptrdiff_t size)
{
    const ptrdiff_t length = size / (STREAMS * BLOCK) * BLOCK; /* of a stream */
    doubles sums = {0};
    for (ptrdiff_t block = 0; block < length; block += BLOCK) {
        floats partial[STREAMS] = {{0}};
        for (ptrdiff_t i = block; i < block + BLOCK; i += LANES)
#pragma GCC unroll 4
            for (int stream = 0; stream < STREAMS; stream++) {
                const float *address = x + stream * length + i;
                __builtin_prefetch(address + AHEAD);
                floats value = load(address);
                partial[stream] += value * value;
            }
#pragma GCC unroll 4
        for (int stream = 0; stream < STREAMS; stream++)
            sums += __builtin_convertvector(partial[stream], doubles);
    }
    double total = 0;
    for (int lane = 0; lane < LANES; lane++)
        total += sums[lane];
    for (ptrdiff_t i = STREAMS * length; i < size; i++)
        total += (double)x[i] * x[i];
    return total;
}

static PyObject *squared_norms(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    Py_buffer addresses, sizes, pieces, results, counter;
    if (!PyArg_ParseTuple(arguments, "y*y*y*w*w*", &addresses, &sizes, &pieces, &results, &counter))
        return NULL;
    const int64_t count = results.len / (Py_ssize_t)sizeof(double);
    const uint64_t *address = addresses.buf;
    const int64_t *size = sizes.buf, *parts = pieces.buf;
    double *result = results.buf;
    int64_t *next = counter.buf;
    Py_BEGIN_ALLOW_THREADS
    int64_t tensor = 0, first = 0; /* piece of this tensor */
    for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count;) {
        while (i >= first + parts[tensor])
            first += parts[tensor++];
        const int64_t length = (size[tensor] + parts[tensor] - 1) / parts[tensor], start = (i - first) * length;
        const int64_t rest = size[tensor] - start;
        result[i] = squared_norm((const float *)(uintptr_t)address[tensor] + start, rest < length ? rest : length);
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&addresses);
    PyBuffer_Release(&sizes);
    PyBuffer_Release(&pieces);
    PyBuffer_Release(&results);
    PyBuffer_Release(&counter);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"squared_norms", squared_norms, METH_VARARGS,
     "squared_norms(addresses, sizes, pieces, results, counter)\n\n"
     "Squared norms of the pieces of arrays of float32: array i has sizes[i] elements at addresses[i] and is divided into pieces[i] > 0\n"
     "pieces of equal length (the last may be shorter). Computes results[j] of every piece j, in the order of the arrays, from counter[0]\n"
     "on, that no other thread has taken: call it in as many threads as shall share the work. Buffers of uint64, int64, int64,\n"
     "float64 (sum of pieces), int64 (1). The GIL is released."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_squares", .m_size = 0, .m_methods = methods};

PyMODINIT_FUNC PyInit__squares(void)
{
    return PyModuleDef_Init(&module);
}
