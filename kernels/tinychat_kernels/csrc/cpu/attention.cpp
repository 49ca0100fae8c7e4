#include "attention.h"

#include <algorithm>
#include <limits>

#include "arena.h"

namespace tinychat {
namespace {

constexpr int64_t kTile = 96;  // queries of a task: their scores of a block take 96 KiB
constexpr int64_t kSplitPairs = 32;
constexpr int64_t kMostInTurn = 8;  // blocks that a thread takes at once: what is asked for ahead is then its own
constexpr int64_t kTurnsAThread = 8;
constexpr float kLog2e = 1.44269504f;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What the parts of the work are: a tile is up to kTile (token, head of a group) pairs of a row and a key head.
struct Plan {
    int64_t group;   // query heads a key head
    int64_t pairs;   // of a row and a key head
    int64_t tiles;   // of a row and a key head
    int64_t blocks;  // most blocks of keys that a tile sees
    int64_t tasks;   // tiles in all
    bool split;      // each block of a tile is a task of its own, merged later: for decoding
};

Plan plan_for(int64_t rows, int64_t count, int64_t heads, int64_t kv_heads, int64_t longest) {
    Plan p;
    p.group = heads / kv_heads;
    p.pairs = count * p.group;
    p.tiles = ceil_div(p.pairs, kTile);
    p.blocks = ceil_div(longest, kBlock);
    p.tasks = rows * kv_heads * p.tiles;
    p.split = p.pairs <= kSplitPairs && p.blocks > 1;
    return p;
}

// One thread's tile.
struct Tile {
    float* q;
    float* part;
    float* scores;
    int16_t* rounded;
    float* steps;
    int16_t* weights;
    int64_t* first;
    int64_t* end;
    Partial block;
    Partial total;
};

Partial take_partial(Arena& arena, int64_t count, int64_t head_dim) {
    Partial p;
    p.out = arena.take<float>(count * head_dim);
    p.sum = arena.take<float>(count * kSums);
    p.top = arena.take<float>(count);
    return p;
}

size_t partial_size(int64_t count, int64_t head_dim) {
    Arena arena(nullptr);
    take_partial(arena, count, head_dim);
    return arena.used();
}

Tile tile_at(Arena& arena, int64_t head_dim) {
    Tile t;
    t.q = arena.take<float>(kTile * head_dim);
    t.part = arena.take<float>(kPart * head_dim);
    t.scores = arena.take<float>(kTile * kBlock);
    t.rounded = arena.take<int16_t>(kTile * head_dim);
    t.steps = arena.take<float>(kTile);
    t.weights = arena.take<int16_t>(kTile * kBlock);
    t.first = arena.take<int64_t>(kTile);
    t.end = arena.take<int64_t>(kTile);
    t.block = take_partial(arena, kTile, head_dim);
    t.total = take_partial(arena, kTile, head_dim);
    return t;
}

size_t tile_size(int64_t head_dim) {
    Arena arena(nullptr);
    tile_at(arena, head_dim);
    return arena.used();
}

class Worker {
  public:
    Worker(Team& team, const Attention& a)
        : team_(team), a_(a), ops_(float_ops()),
          plan_(plan_for(a.rows, a.count, a.heads, a.kv_heads, longest_context(a))) {
        Arena arena(team.scratch(Scratch::attention, tile_size(a.head_dim)));
        tile_ = tile_at(arena, a.head_dim);
    }

    void run() {
        if (plan_.split) return run_split();
        // the last tiles of a row see most: they go first
        for (int64_t i; (i = team_.next()) < plan_.tasks;) whole_tile(plan_.tasks - 1 - i);
    }

  private:
    static int64_t longest_context(const Attention& a) {
        return *std::max_element(a.starts, a.starts + a.rows) + a.count;
    }

    struct Place {
        int64_t row, head;   // head: of the keys
        int64_t pair;        // the first
        int64_t count;       // of pairs
        int64_t first_block, end_block;
    };

    Place place(int64_t task) const {
        Place p;
        p.row = task % a_.rows;
        p.head = task / a_.rows % a_.kv_heads;
        p.pair = task / a_.rows / a_.kv_heads * kTile;
        p.count = std::min(kTile, plan_.pairs - p.pair);
        p.first_block = first_key(p, 0) / kBlock;
        p.end_block = ceil_div(end_key(p, p.count - 1), kBlock);
        return p;
    }

    int64_t end_key(const Place& p, int64_t i) const {
        return a_.starts[p.row] + (a_.causal ? (p.pair + i) / plan_.group + 1 : a_.count);
    }

    int64_t first_key(const Place& p, int64_t i) const {
        return a_.window ? std::max<int64_t>(0, end_key(p, i) - a_.window) : 0;
    }

    Queries queries(const Place& p) {
        for (int64_t i = 0; i < p.count; ++i) {
            const int64_t pair = p.pair + i, token = p.row * a_.count + pair / plan_.group;
            const int64_t head = p.head * plan_.group + pair % plan_.group;
            float* q = tile_.q + i * a_.head_dim;
            ops_.scale(a_.q + token * a_.ldq + head * a_.head_dim, a_.scale * kLog2e, a_.head_dim, q);
            if (a_.kind == Kind::i8) tile_.steps[i] = ops_.round_query(q, a_.head_dim, tile_.rounded + i * a_.head_dim);
            tile_.first[i] = first_key(p, i);
            tile_.end[i] = end_key(p, i);
        }
        const int64_t token = (a_.slots[p.row] * a_.kv_heads + p.head) * a_.capacity;
        const int64_t offset = token * a_.head_dim * kind_size(a_.kind);
        Queries q = {tile_.q, tile_.first, tile_.end, p.count, a_.head_dim, static_cast<const char*>(a_.keys) + offset,
                     static_cast<const char*>(a_.values) + offset, tile_.part, tile_.scores,
                     nullptr, nullptr, tile_.rounded, tile_.steps, tile_.weights};
        if (a_.kind == Kind::i8) {
            q.key_scales = a_.key_scales + token;
            q.value_scales = a_.value_scales + token;
        }
        return q;
    }

    void attend_block(const Queries& q, int64_t block, const Partial& result) const {
        ops_.attend_block[index(a_.kind)](q, block * kBlock, result);
    }

    void clear(const Partial& p, int64_t count) const {
        std::fill_n(p.out, count * a_.head_dim, 0.f);
        std::fill_n(p.sum, count * kSums, 0.f);
        std::fill_n(p.top, count, -std::numeric_limits<float>::infinity());
    }

    void finish(const Place& p, const Partial& total) const {
        for (int64_t i = 0; i < p.count;) {  // the heads of a token together
            const int64_t pair = p.pair + i, token = p.row * a_.count + pair / plan_.group, head = pair % plan_.group;
            const int64_t n = std::min(plan_.group - head, p.count - i);
            const Partial from = {total.out + i * a_.head_dim, total.sum + i * kSums, total.top + i};
            ops_.finish(from, n, a_.head_dim,
                        a_.y + token * a_.ldy + (p.head * plan_.group + head) * a_.head_dim, a_.head_dim);
            i += n;
        }
    }

    void whole_tile(int64_t task) {
        const Place p = place(task);
        const Queries q = queries(p);
        clear(tile_.total, p.count);
        for (int64_t block = p.first_block; block < p.end_block; ++block) {
            attend_block(q, block, tile_.block);
            ops_.merge(tile_.total, tile_.block, p.count, a_.head_dim);
        }
        finish(p, tile_.total);
    }

    // The shared memory: a partial for each task and block.
    Partial partial_of(int64_t task, int64_t block) const {
        const size_t size = partial_size(plan_.pairs, a_.head_dim);
        Arena arena(static_cast<char*>(a_.memory) + size * static_cast<size_t>(task * plan_.blocks + block));
        return take_partial(arena, plan_.pairs, a_.head_dim);
    }

    void run_split() {
        const int64_t all = plan_.tasks * plan_.blocks;
        const int64_t in_turn = std::clamp<int64_t>(all / (kTurnsAThread * team_.count()), 1, kMostInTurn);
        const int64_t turns = ceil_div(plan_.blocks, in_turn);  // of a task
        for (int64_t i; (i = team_.next()) < plan_.tasks * turns;) {
            const int64_t task = i / turns, first = i % turns * in_turn;
            const Place p = place(task);
            const int64_t begin = std::max(first, p.first_block), end = std::min(first + in_turn, p.end_block);
            if (begin >= end) continue;
            const Queries q = queries(p);
            for (int64_t block = begin; block < end; ++block) attend_block(q, block, partial_of(task, block));
        }
        team_.barrier();
        const Range own = team_.share(plan_.tasks);
        for (int64_t task = own.begin; task < own.end; ++task) {
            const Place p = place(task);
            clear(tile_.total, p.count);
            for (int64_t block = p.first_block; block < p.end_block; ++block) {
                ops_.merge(tile_.total, partial_of(task, block), p.count, a_.head_dim);
            }
            finish(p, tile_.total);
        }
    }

    Team& team_;
    const Attention& a_;
    const FloatOps& ops_;
    Plan plan_;
    Tile tile_;
};

}  // namespace

size_t attention_memory(int64_t rows, int64_t count, int64_t heads, int64_t kv_heads, int64_t head_dim,
                        int64_t longest) {
    const Plan p = plan_for(rows, count, heads, kv_heads, longest);
    return p.split ? partial_size(p.pairs, head_dim) * static_cast<size_t>(p.tasks * p.blocks) : 0;
}

void attention(Team& team, const Attention& a) { Worker(team, a).run(); }

}  // namespace tinychat
