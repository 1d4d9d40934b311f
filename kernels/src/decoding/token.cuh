// A token of a decoding step.
#pragma once
#include "common.cuh"

struct Token {
    int position; // in its sequence
    int first;    // row of the cache that its sequence begins at
    int owner;    // its adapter; -1: none
    int unused;
};
