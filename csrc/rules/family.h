// The family that a unit is compiled for. The build names it in PRECOND_FAMILY, and its header in
// PRECOND_FAMILY_HEADER; PRECOND_RULES(RULE) is its list of rules.
#pragma once

#include PRECOND_FAMILY_HEADER
#include "rules/parts.h"

#define PRECOND_JOINED(a, b) a##b
#define PRECOND_JOIN(a, b) PRECOND_JOINED(a, b)
#define PRECOND_RULES(RULE) PRECOND_JOIN(PRECOND_RULES_, PRECOND_FAMILY)(RULE)
// Each rule; after the last each with masks, parts.h; and then each with an average too.
#define PRECOND_RULES_AND_PARTS(RULE, MASKS, AVERAGE) PRECOND_RULES(RULE) PRECOND_RULES(MASKS) PRECOND_RULES(AVERAGE)
