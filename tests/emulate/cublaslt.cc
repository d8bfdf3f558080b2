/* cublaslt.cc - the few functions of cuBLASLt that the project calls, emulated: matrices of f32
 * or bf16 in columns or rows, strided batches, f32 sums, no epilogue. Other things are
 * NOT_SUPPORTED, as the library says it.
 */
#include "engine/kernels/cuda/device.cuh"
#include "tests/emulate/block.h"

#include <cublasLt.h>
#include <stdlib.h>

#include <vector>

namespace
{

struct matrix {
    cudaDataType type;
    uint64_t rows, columns;
    int64_t stride; /* between columns, or rows */
    cublasLtOrder_t order;
    int32_t n_batches;
    int64_t batch_stride;
};

struct product {
    cublasComputeType_t compute;
    cudaDataType scale;
    int32_t pointer_mode, transposed_a, transposed_b, epilogue;
};

struct call {
    product p;
    matrix a, b, c, d;
    const void *from_a, *from_b, *from_c;
    void *to;
    float alpha, beta;
};

} // namespace

static matrix *matrix_of(cublasLtMatrixLayout_t layout)
{
    return reinterpret_cast<matrix *>(layout);
}
static product *product_of(cublasLtMatmulDesc_t desc)
{
    return reinterpret_cast<product *>(desc);
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle)
{
    *handle = (cublasLtHandle_t)calloc(1, 1);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle)
{
    free(handle);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type,
                                          uint64_t rows, uint64_t columns, int64_t stride)
{
    auto m = new matrix{type, rows, columns, stride, CUBLASLT_ORDER_COL, 1, 0};
    *layout = reinterpret_cast<cublasLtMatrixLayout_t>(m);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout)
{
    delete matrix_of(layout);
    return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t set(void *to, size_t n_bytes, const void *from, size_t n_given)
{
    if (n_given != n_bytes)
        return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(to, from, n_bytes);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute,
                                                const void *from, size_t n)
{
    matrix *m = matrix_of(layout);
    switch (attribute) {
    case CUBLASLT_MATRIX_LAYOUT_TYPE:
        return set(&m->type, sizeof(m->type), from, n);
    case CUBLASLT_MATRIX_LAYOUT_ORDER:
        return set(&m->order, sizeof(m->order), from, n);
    case CUBLASLT_MATRIX_LAYOUT_ROWS:
        return set(&m->rows, sizeof(m->rows), from, n);
    case CUBLASLT_MATRIX_LAYOUT_COLS:
        return set(&m->columns, sizeof(m->columns), from, n);
    case CUBLASLT_MATRIX_LAYOUT_LD:
        return set(&m->stride, sizeof(m->stride), from, n);
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT:
        return set(&m->n_batches, sizeof(m->n_batches), from, n);
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET:
        return set(&m->batch_stride, sizeof(m->batch_stride), from, n);
    default:
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *desc, cublasComputeType_t compute,
                                        cudaDataType_t scale)
{
    auto p = new product{compute,     scale,       CUBLASLT_POINTER_MODE_HOST,
                         CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT};
    *desc = reinterpret_cast<cublasLtMatmulDesc_t>(p);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc)
{
    delete product_of(desc);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void *from, size_t n)
{
    product *p = product_of(desc);
    switch (attribute) {
    case CUBLASLT_MATMUL_DESC_POINTER_MODE:
        return set(&p->pointer_mode, sizeof(p->pointer_mode), from, n);
    case CUBLASLT_MATMUL_DESC_TRANSA:
        return set(&p->transposed_a, sizeof(p->transposed_a), from, n);
    case CUBLASLT_MATMUL_DESC_TRANSB:
        return set(&p->transposed_b, sizeof(p->transposed_b), from, n);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
        return set(&p->epilogue, sizeof(p->epilogue), from, n);
    case CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET:
        return CUBLAS_STATUS_SUCCESS;
    default:
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference)
{
    *preference = (cublasLtMatmulPreference_t)calloc(1, 1);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference)
{
    free((void *)preference);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t,
                                                    cublasLtMatmulPreferenceAttributes_t,
                                                    const void *, size_t)
{
    return CUBLAS_STATUS_SUCCESS;
}

/* ---- products ---- */

static bool is_type(const matrix *m)
{
    return m->type == CUDA_R_32F || m->type == CUDA_R_16BF;
}

static bool is_placed(const matrix *m)
{
    const bool columns = m->order == CUBLASLT_ORDER_COL;
    return (columns || m->order == CUBLASLT_ORDER_ROW) &&
           m->stride >= (int64_t)(columns ? m->rows : m->columns);
}

static cublasStatus_t check(const product *p, const matrix *a, const matrix *b, const matrix *c,
                            const matrix *d)
{
    const bool ta = p->transposed_a != CUBLAS_OP_N, tb = p->transposed_b != CUBLAS_OP_N;
    const uint64_t m = ta ? a->columns : a->rows, k = ta ? a->rows : a->columns;
    const uint64_t n = tb ? b->rows : b->columns;
    if ((tb ? b->columns : b->rows) != k || d->rows != m || d->columns != n || c->rows != m ||
        c->columns != n || !is_placed(a) || !is_placed(b) || !is_placed(c) || !is_placed(d))
        return CUBLAS_STATUS_INVALID_VALUE;
    if (p->pointer_mode != CUBLASLT_POINTER_MODE_HOST || p->epilogue != CUBLASLT_EPILOGUE_DEFAULT ||
        p->scale != CUDA_R_32F || !is_type(a) || a->type != b->type || !is_type(d) ||
        c->type != d->type || (a->type == CUDA_R_32F && d->type != CUDA_R_32F))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t, int n_wanted,
                                              cublasLtMatmulHeuristicResult_t results[],
                                              int *n_results)
{
    *n_results = 0;
    cublasStatus_t status =
        check(product_of(desc), matrix_of(a), matrix_of(b), matrix_of(c), matrix_of(d));
    if (status != CUBLAS_STATUS_SUCCESS || n_wanted < 1)
        return status;
    memset((void *)results, 0, sizeof(*results));
    results[0].state = CUBLAS_STATUS_SUCCESS;
    results[0].wavesCount = 1;
    *n_results = 1;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t, cublasLtMatmulDesc_t desc,
                                       cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                       cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                       const cublasLtMatmulAlgo_t *,
                                       cublasLtMatmulHeuristicResult_t *result)
{
    memset((void *)result, 0, sizeof(*result));
    return check(product_of(desc), matrix_of(a), matrix_of(b), matrix_of(c), matrix_of(d));
}

static size_t index_of(const matrix *m, int64_t batch, uint64_t row, uint64_t column)
{
    const bool columns = m->order == CUBLASLT_ORDER_COL;
    return (size_t)(batch * m->batch_stride) +
           (columns ? column * (uint64_t)m->stride + row : row * (uint64_t)m->stride + column);
}

static float value(const void *p, const matrix *m, size_t i)
{
    return m->type == CUDA_R_32F ? ((const float *)p)[i] : to_float(((const bf16 *)p)[i]);
}

/* op(m) as f32, [rows, columns] or, `across`, [columns, rows]: sums then run along both. */
static std::vector<float> unpack(const void *p, const matrix *m, int batch, bool across)
{
    std::vector<float> out(m->rows * m->columns);
    for (uint64_t i = 0; i < m->rows; i++)
        for (uint64_t j = 0; j < m->columns; j++)
            out[across ? j * m->rows + i : i * m->columns + j] =
                value(p, m, index_of(m, batch, i, j));
    return out;
}

static void multiply(const call *c, int batch)
{
    const bool ta = c->p.transposed_a != CUBLAS_OP_N, tb = c->p.transposed_b != CUBLAS_OP_N;
    const size_t k = ta ? c->a.rows : c->a.columns;
    const std::vector<float> a = unpack(c->from_a, &c->a, batch, ta);
    const std::vector<float> b = unpack(c->from_b, &c->b, batch, !tb);
    for (uint64_t i = 0; i < c->d.rows; i++) {
        for (uint64_t j = 0; j < c->d.columns; j++) {
            float sum = 0;
            for (size_t l = 0; l < k; l++)
                sum += a[i * k + l] * b[j * k + l];
            sum *= c->alpha;
            if (c->beta != 0)
                sum += c->beta * value(c->from_c, &c->c, index_of(&c->c, batch, i, j));
            const size_t at = index_of(&c->d, batch, i, j);
            if (c->d.type == CUDA_R_32F)
                ((float *)c->to)[at] = sum;
            else
                ((bf16 *)c->to)[at] = from_float<bf16>(sum);
        }
    }
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void *alpha,
                              const void *from_a, cublasLtMatrixLayout_t a, const void *from_b,
                              cublasLtMatrixLayout_t b, const void *beta, const void *from_c,
                              cublasLtMatrixLayout_t c, void *to, cublasLtMatrixLayout_t d,
                              const cublasLtMatmulAlgo_t *, void *, size_t, cudaStream_t stream)
{
    call one = {*product_of(desc),
                *matrix_of(a),
                *matrix_of(b),
                *matrix_of(c),
                *matrix_of(d),
                from_a,
                from_b,
                from_c,
                to,
                *(const float *)alpha,
                *(const float *)beta};
    cublasStatus_t status = check(&one.p, &one.a, &one.b, &one.c, &one.d);
    if (status != CUBLAS_STATUS_SUCCESS)
        return status;
    cudaError_t error = emulate::enqueue(stream, [one] {
        for (int i = 0; i < one.d.n_batches; i++)
            multiply(&one, i);
        return cudaSuccess;
    });
    return error ? CUBLAS_STATUS_EXECUTION_FAILED : CUBLAS_STATUS_SUCCESS;
}
