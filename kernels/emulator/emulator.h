// What a test includes before the kernels.
#pragma once
#include "copies.h"
#include "cuda.h"
#include "host.h"
#include "products.h"
