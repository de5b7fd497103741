/* ratios.c: 7-bit ratios to the decoded predecessor, back to weights.  SPEC.md section 4.3. */
#include "ratios.h"

#include "environment.h"
#include "exact.h"
#include "faults.h"

const uint32_t skl_ratio_table[128] = {
    2147483648u, 2146030505u, 2141676973u, 2134440703u, 2124350982u, 2111448536u, 2095785251u, 2077423834u,
    2056437387u, 2032908925u, 2006930832u, 1978604253u, 1948038440u, 1915350050u, 1880662405u, 1844104720u,
    1805811301u, 1765920730u, 1724575029u, 1681918831u, 1638098541u, 1593261510u, 1547555228u, 1501126526u,
    1454120821u, 1406681375u, 1358948606u, 1311059430u, 1263146652u, 1215338407u, 1167757650u, 1120521696u,
    1073741824u, 1027522926u, 981963222u, 937154024u, 893179563u, 850116863u, 808035676u, 766998459u,
    727060411u, 688269547u, 650666822u, 614286287u, 579155293u, 545294717u, 512719224u, 481437553u,
    451452825u, 422762871u, 395360569u, 369234198u, 344367798u, 320741532u, 298332053u, 277112863u,
    257054673u, 238125757u, 220292288u, 203518674u, 187767873u, 173001696u, 159181093u, 146266429u,
    134217728u, 122994916u, 112558031u, 102867424u, 93883937u, 85569062u, 77885085u, 70795211u,
    64263668u, 58255803u, 52738154u, 47678514u, 43045975u, 38810964u, 34945267u, 31422038u,
    28215802u, 25302445u, 22659202u, 20264636u, 18098603u, 16142223u, 14377841u, 12788985u,
    11360319u, 10077598u, 8927617u, 7898164u, 6977965u, 6156636u, 5424632u, 4773194u,
    4194304u, 3680635u, 3225505u, 2822830u, 2467083u, 2153252u, 1876800u, 1633628u,
    1420040u, 1232707u, 1068639u, 925155u, 799853u, 690586u, 595439u, 512706u,
    440872u, 378589u, 324665u, 278045u, 237798u, 203101u, 173232u, 147556u,
    125515u, 106622u, 90451u, 76628u, 64830u, 54774u, 46216u, 38942u,
};

static int reaches_zero(uint32_t num_positions, const int64_t *offsets, const uint8_t *codes)
{
    int zero = 0;
    for (uint32_t t = 0; t < num_positions; t++) {
        uint32_t v = SKL_RATIO_ONE;
        for (int64_t i = offsets[t]; i < offsets[t + 1]; i++)
            v = skl_ratio_step(v, codes[i]);
        zero |= v == 0; /* where it stays */
    }
    return zero;
}

int skl_expand_from(uint32_t num_positions, const int64_t *offsets, const uint8_t *codes, uint32_t scale_log2,
                    float *weights)
{
    if (weights == NULL)
        return reaches_zero(num_positions, offsets, codes);
    const float unit = (float)(UINT64_C(1) << scale_log2) / (float)SKL_RATIO_ONE; /* exact: powers of two */
    int zero = 0;
    for (uint32_t t = 0; t < num_positions; t++) {
        const int64_t end = offsets[t + 1]; /* by itself, since what is stored might change it */
        uint32_t v = SKL_RATIO_ONE;
        for (int64_t i = offsets[t]; i < end; i++) {
            v = skl_ratio_step(v, codes[i]);
            weights[i] = (float)v * unit;
        }
        zero |= v == 0;
    }
    return zero;
}

skl_status skl_expand(uint32_t num_positions, uint64_t num_records, const int64_t *offsets, const uint8_t *codes,
                      uint32_t scale_log2, float *weights)
{
    SKL_DEFAULT_ENVIRONMENT;
    skl_fault fault;
    if (scale_log2 > 30 || skl_check_offsets(num_positions, offsets, num_records, &fault) != SKL_OK)
        return SKL_ERR_ARG;
    skl_expand_from(num_positions, offsets, codes, scale_log2, weights);
    return SKL_OK;
}
