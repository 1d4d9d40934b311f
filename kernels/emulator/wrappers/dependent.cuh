inline void wait_before() {}
inline void let_next() {}
