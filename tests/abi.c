// Uses the C ABI as the bridge does, without ggml: f32 weights, dot product and activation of our own.
// Prints "ok" when every row came out right and every misuse was refused.

#include "moe_hot.h"

#include "ggml.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_EMBD = 64, N_FF = 128, N_EXPERT = 16, N_USED = 4, MAX_TOKENS = 7 };

static float gate[N_EXPERT][N_FF][N_EMBD], up[N_EXPERT][N_FF][N_EMBD], down[N_EXPERT][N_EMBD][N_FF];

#define CHECK(x)                                                                              \
    do {                                                                                      \
        if (!(x)) {                                                                           \
            printf("abi.c:%d: %s is false; last error: %s\n", __LINE__, #x, moe_hot_error()); \
            exit(1);                                                                          \
        }                                                                                     \
    } while (0)

static void dot(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc) {
    (void) bs, (void) bx, (void) by;
    CHECK(nrc == 1);
    float sum = 0;
    for (int i = 0; i < n; i++) {
        sum += ((const float *) x)[i] * ((const float *) y)[i];
    }
    *s = sum;
}

static void swiglu(int n, float * y, const float * x, const float * g) {
    for (int i = 0; i < n; i++) {
        y[i] = x[i] / (1.0f + expf(-x[i])) * g[i];
    }
}

static moe_hot_matrix matrix(const void * data, int64_t n_in, int64_t n_out) {
    moe_hot_matrix m = { 0 };
    m.data          = data;
    m.type_         = GGML_TYPE_F32;
    m.n_in          = n_in;
    m.n_out         = n_out;
    m.row_bytes     = n_in * sizeof(float);
    m.expert_bytes  = n_in * n_out * sizeof(float);
    m.vec_dot       = dot;
    m.act_row_bytes = n_in * sizeof(float);
    return m;
}

static struct ggml_tensor tensor(void * data, size_t size, int64_t ne0, int64_t ne1, int64_t ne2, size_t nb1) {
    struct ggml_tensor t;
    memset(&t, 0, sizeof(t));
    t.data  = data;
    t.ne[0] = ne0, t.ne[1] = ne1, t.ne[2] = ne2, t.ne[3] = 1;
    t.nb[0] = size, t.nb[1] = nb1, t.nb[2] = nb1 * ne1, t.nb[3] = nb1 * ne1 * ne2;
    return t;
}

static float noise(void) { return (float) rand() / (float) RAND_MAX - 0.5f; }

static int n_messages = 0;

static void on_log(int32_t level, const char * text, void * user_data) {
    (void) level;
    CHECK(user_data == &n_messages && strncmp(text, "moe-hot: ", 9) == 0);
    n_messages++;
}

static void expect_row(int expert, const float * x, const float * got) {
    float h[N_FF], u[N_FF];
    for (int i = 0; i < N_FF; i++) {
        dot(N_EMBD, &h[i], 0, gate[expert][i], 0, x, 0, 1);
        dot(N_EMBD, &u[i], 0, up[expert][i], 0, x, 0, 1);
    }
    swiglu(N_FF, h, h, u);
    for (int i = 0; i < N_EMBD; i++) {
        float y;
        dot(N_FF, &y, 0, down[expert][i], 0, h, 0, 1);
        CHECK(memcmp(&y, &got[i], sizeof(y)) == 0);
    }
}

int main(void) {
    for (int i = 0; i < N_EXPERT * N_FF * N_EMBD; i++) {
        ((float *) gate)[i] = noise();
        ((float *) up)[i]   = noise();
        ((float *) down)[i] = noise();
    }
    moe_hot_set_log(on_log, &n_messages);

    // misuse is refused, with a message
    moe_hot_context * ctx    = NULL;
    bool              active = true;
    bool              hot = false;
    CHECK(moe_hot_option_set("moe-hot-k", "-1") == MOE_HOT_INVALID_ARGUMENT && strstr(moe_hot_error(), "--moe-hot-k: '-1'"));
    CHECK(moe_hot_option_set(NULL, "1") == MOE_HOT_INVALID_ARGUMENT);
    CHECK(moe_hot_option_set("moe-hot-size", "1") == MOE_HOT_INVALID_ARGUMENT);
    CHECK(moe_hot_option_get("moe-hot-size") == NULL);
    CHECK(moe_hot_context_create(NULL, &ctx) == MOE_HOT_INVALID_ARGUMENT && ctx == NULL);
    CHECK(moe_hot_context_create(&ctx, NULL) == MOE_HOT_INVALID_ARGUMENT);
    CHECK(moe_hot_activate(NULL, 1, "test", &active) == MOE_HOT_INVALID_ARGUMENT);
    CHECK(moe_hot_step_begin(NULL, 1, NULL, &hot) == MOE_HOT_INVALID_ARGUMENT);
    CHECK(moe_hot_find(NULL, gate) == -1 && moe_hot_op_data(NULL, 0) == NULL && moe_hot_max_tokens(NULL) == 0);
    moe_hot_context_free(NULL);
    moe_hot_model_free(NULL);

    CHECK(moe_hot_option_set("moe-hot-k", "6") == MOE_HOT_OK && strcmp(moe_hot_option_get("moe-hot-k"), "6") == 0);
    CHECK(moe_hot_option_set("moe-hot-rebalance-interval", "1") == MOE_HOT_OK);
    CHECK(moe_hot_option_set("moe-hot-threads", "2") == MOE_HOT_OK);
    bool enabled = false;
    CHECK(moe_hot_enabled(&enabled) == MOE_HOT_OK && enabled);

    CHECK(moe_hot_context_create(gate, &ctx) == MOE_HOT_OK);
    moe_hot_layer layer = { 0 };
    layer.il         = 3;
    layer.n_expert   = N_EXPERT;
    layer.n_used     = N_USED;
    layer.gate       = matrix(gate, N_EMBD, N_FF);
    layer.up         = matrix(up, N_EMBD, N_FF);
    layer.down       = matrix(down, N_FF, N_EMBD);
    layer.activation = MOE_HOT_GATED;
    CHECK(moe_hot_offer(ctx, &layer) == MOE_HOT_INVALID_ARGUMENT && strstr(moe_hot_error(), "layer 3"));
    layer.gated = swiglu;
    layer.down.n_in--;
    CHECK(moe_hot_offer(ctx, &layer) == MOE_HOT_INVALID_ARGUMENT);
    layer.down.n_in++;
    layer.activation = 3;
    CHECK(moe_hot_offer(ctx, &layer) == MOE_HOT_INVALID_ARGUMENT && strstr(moe_hot_error(), "activation 3"));
    layer.activation = MOE_HOT_GATED;
    layer.up.row_bytes += sizeof(float); // a gap that slots do not have
    CHECK(moe_hot_offer(ctx, &layer) == MOE_HOT_INVALID_ARGUMENT && strstr(moe_hot_error(), "up has 260 bytes a row"));
    layer.up.row_bytes -= sizeof(float);
    CHECK(moe_hot_offer(ctx, (const void *) ((const char *) &layer + 1)) == MOE_HOT_INVALID_ARGUMENT);
    CHECK(moe_hot_offer(ctx, &layer) == MOE_HOT_OK);
    CHECK(moe_hot_find(ctx, down) == -1);
    CHECK(moe_hot_activate(ctx, 1, "test", &active) == MOE_HOT_OK && active && n_messages > 0);
    CHECK(moe_hot_activate(ctx, 1, "test", &active) == MOE_HOT_STATE);
    CHECK(moe_hot_find(ctx, down) == 0 && moe_hot_find(ctx, gate) == -1);
    CHECK(moe_hot_max_tokens(ctx) == MAX_TOKENS);
    moe_hot_slots slots;
    CHECK(moe_hot_get_slots(ctx, 1, &slots) == MOE_HOT_INVALID_ARGUMENT);
    CHECK(moe_hot_get_slots(ctx, 0, &slots) == MOE_HOT_OK && slots.n_slots == N_EXPERT && slots.n_matrices == 3); // addresses for all
    moe_hot_stats counted;
    CHECK(moe_hot_get_stats(ctx, &counted) == MOE_HOT_OK && counted.n_slots == 6);
    moe_hot_response answer;
    CHECK(moe_hot_http("GET", "/moe-hot", NULL, 0, false, &answer) == MOE_HOT_OK && answer.status == 200);
    CHECK(strstr(answer.body, "\"slots\":6,") && answer.security_policy == NULL);
    CHECK(moe_hot_http("POST", "/moe-hot", "{\"k\": 2}", 8, true, &answer) == MOE_HOT_OK && answer.status == 200);
    CHECK(strstr(answer.body, "\"slots\":2,"));
    CHECK(moe_hot_http("POST", "/moe-hot", "{\"k\": 6}", 8, true, &answer) == MOE_HOT_OK && answer.status == 200);
    CHECK(moe_hot_http("GET", NULL, NULL, 0, false, &answer) == MOE_HOT_INVALID_ARGUMENT);
    CHECK(!moe_hot_give_back("0000:01:00.0", 1));
    void * op = moe_hot_op_data(ctx, 0);
    CHECK(op != NULL && moe_hot_op_data(ctx, 1) == NULL);

    // ubatches of 1 to 7 tokens, experts in favour change every 50 steps
    static float   cur[MAX_TOKENS][N_EMBD], experts[MAX_TOKENS][N_USED][N_EMBD];
    static int32_t ids[MAX_TOKENS][N_EXPERT], slot_ids[MAX_TOKENS][N_USED];
    uint64_t       n_ids = 0;
    for (int step = 0; step < 400; step++) {
        const int n_tokens = 1 + step % MAX_TOKENS;
        for (int t = 0; t < n_tokens; t++) {
            for (int i = 0; i < N_EMBD; i++) {
                cur[t][i] = noise();
            }
            for (int k = 0; k < N_USED; k++) {
                ids[t][k] = (step / 50 * 3 + k * 2 + rand() % 2) % N_EXPERT;
            }
        }
        memset(experts, 0x7f, sizeof(experts));
        struct ggml_tensor t_cur  = tensor(cur, sizeof(float), N_EMBD, 1, n_tokens, sizeof(cur[0]));
        struct ggml_tensor t_ids  = tensor(ids, sizeof(int32_t), N_USED, n_tokens, 1, sizeof(ids[0]));
        struct ggml_tensor t_slot = tensor(slot_ids, sizeof(int32_t), N_USED, n_tokens, 1, sizeof(slot_ids[0]));
        struct ggml_tensor t_exp  = tensor(experts, sizeof(float), N_EMBD, N_USED, n_tokens, sizeof(experts[0][0]));
        t_slot.src[0] = &t_cur, t_slot.src[1] = &t_ids;
        t_exp.src[0] = &t_exp, t_exp.src[1] = &t_slot;

        CHECK(moe_hot_step_begin(ctx, n_tokens, NULL, &hot) == MOE_HOT_OK && hot);
        moe_hot_dispatch(&t_slot, 0, 1, op);
        moe_hot_join(&t_exp, 0, 1, op);
        for (int t = 0; t < n_tokens; t++) {
            for (int k = 0; k < N_USED; k++) {
                const int slot = slot_ids[t][k], expert = ids[t][k];
                CHECK(slot >= -1 && slot < 6);
                if (slot >= 0) {
                    // the slot holds this expert, and JOIN left its row alone
                    CHECK(memcmp((char *) slots.data[0] + slot * sizeof(gate[0]), gate[expert], sizeof(gate[0])) == 0);
                    CHECK(memcmp((char *) slots.data[1] + slot * sizeof(up[0]), up[expert], sizeof(up[0])) == 0);
                    CHECK(memcmp((char *) slots.data[2] + slot * sizeof(down[0]), down[expert], sizeof(down[0])) == 0);
                    CHECK(((unsigned char *) experts[t][k])[0] == 0x7f);
                } else {
                    expect_row(expert, cur[t], experts[t][k]);
                }
            }
        }
        CHECK(moe_hot_step_end(ctx) == MOE_HOT_OK);
        n_ids += n_tokens * N_USED;
    }
    moe_hot_stats stats;
    CHECK(moe_hot_get_stats(ctx, &stats) == MOE_HOT_OK);
    CHECK(stats.n_steps == 400 && stats.n_hits + stats.n_misses == n_ids);
    CHECK(stats.n_hits > n_ids / 4 && stats.n_misses > 0 && stats.n_uploads > 6 && stats.n_evictions > 0);
    CHECK(moe_hot_status_text(ctx) && strstr(moe_hot_summary(ctx), "hit rate"));
    CHECK(moe_hot_reset_stats(ctx) == MOE_HOT_OK && moe_hot_get_stats(ctx, &stats) == MOE_HOT_OK && stats.n_hits == 0);

    // a second context shares the slots; a step that was begun may be left
    moe_hot_context * other = NULL;
    CHECK(moe_hot_context_create(gate, &other) == MOE_HOT_OK && moe_hot_activate(other, 1, "test", &active) == MOE_HOT_OK && active);
    moe_hot_slots shared;
    CHECK(moe_hot_get_slots(other, 0, &shared) == MOE_HOT_OK && shared.data[0] == slots.data[0]);
    CHECK(moe_hot_step_begin(other, 1, NULL, &hot) == MOE_HOT_OK && moe_hot_step_begin(ctx, 1, NULL, &hot) == MOE_HOT_OK);
    moe_hot_context_free(other);
    moe_hot_context_free(ctx);

    // what is no context, or none any more, is refused
    CHECK(moe_hot_step_end(ctx) == MOE_HOT_INVALID_ARGUMENT && strstr(moe_hot_error(), "freed"));
    CHECK(moe_hot_max_tokens(ctx) == 0 && moe_hot_op_data(ctx, 0) == NULL && moe_hot_summary(ctx) == NULL);
    CHECK(moe_hot_step_end((moe_hot_context *) gate) == MOE_HOT_INVALID_ARGUMENT);
    moe_hot_context_free(ctx);
    moe_hot_context_free((moe_hot_context *) gate);
    CHECK(moe_hot_context_create(gate, &other) == MOE_HOT_OK && other != ctx);
    CHECK(moe_hot_get_stats(other, (moe_hot_stats *) ((char *) &stats + 1)) == MOE_HOT_INVALID_ARGUMENT);
    CHECK(moe_hot_get_stats(other, &stats) == MOE_HOT_STATE);
    moe_hot_context_free(other);
    moe_hot_model_free(gate);
    puts("ok");
    return 0;
}
